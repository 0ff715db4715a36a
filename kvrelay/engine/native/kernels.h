// What the files of this library share. Everything here is plain C data, so that code built for different instruction
// sets can call each other. A "bf16" is the upper half of a float32, held as uint16.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

// Queries [rows, H, D], KV planes [slots, G, D] of one layer, out [rows, H * D], all bf16 or all float32.
// sequences[i] = first row, number of rows, position of the first row, address of its block ids, each an int32.
typedef struct {
    const void *queries, *keys, *values;
    void *out;
    const int64_t *sequences;
    int64_t num_sequences, num_heads, num_kv_heads, head_dim, block_size;
    int64_t window;  // positions a query sees, its own included; 0: all
    float scale;
    int32_t bf16;
} KvrAttention;

// One row's queries, keys and values, qkv [rows, (H + 2 G) * D] in float32, on their way into queries and the pool.
// cosine and sine [positions, D / 2]. slots[row] < 0: the KV of that row is there already.
typedef struct {
    const float *qkv, *q_norm, *k_norm, *cosine, *sine;  // norms [D], or null: none
    const int64_t *positions, *slots;
    void *queries, *keys, *values;
    int64_t num_rows, num_heads, num_kv_heads, head_dim;
    float eps;
    int32_t bf16;
} KvrHeads;

// How rows and weights of a GEMM are held: both float32, both bf16, either of them by int8 weights, both int8, or
// float32 by bf16 weights.
enum { KVR_FLOATS, KVR_HALVES, KVR_FLOATS_BY_INT8, KVR_HALVES_BY_INT8, KVR_INT8, KVR_FLOATS_BY_HALVES };

// out [rows, size_out] = (x [rows, size_in] times weight - offsets) * scales * row_scales + bias; added to what out
// has, if accumulate. The weight lies as gemm.h says, each panel panel_steps long. slab: how many steps are added
// up at a time, 128 at most if int8 is widened. What is given by column is padded to whole panels; what is null is left
// out, offsets go with row_scales. out_bf16: out is bf16, else float32.
typedef struct {
    const void *x, *weights;
    void *out;
    const float *bias, *scales;
    const int32_t *offsets;
    const float *row_scales;
    int64_t num_rows, size_in, size_out, x_stride, panel_steps, slab;
    int32_t kind, out_bf16, accumulate;
} KvrGemm;
}

// The part of one attention call that one thread does: consecutive queries of a sequence and KV heads, over the
// segments [first_segment, last_segment) of its context. partials: null, or where each segment's results go.
struct Item {
    int64_t sequence, first_head, num_heads, first_query, num_queries, first_segment, last_segment;
    float *partials;
};

// What is built once for each instruction set. Row functions do rows [first, last).
struct KernelTable {
    const char *name;
    void (*embed)(const int64_t *ids, const void *table, float *out, int64_t width, int32_t bf16, int64_t first,
                  int64_t last);
    void (*rms_norm)(const float *x, const int64_t *rows, const float *weight, float eps, void *out, int64_t width,
                     int32_t bf16, int64_t first, int64_t last);
    void (*silu_mul)(const void *gate_up, void *out, int64_t ffn, int32_t bf16, int64_t first, int64_t last);
    void (*heads)(const KvrHeads *heads, int64_t first, int64_t last);
    size_t (*attention_scratch)(const KvrAttention *attention);
    size_t (*partial_floats)(const KvrAttention *attention, const Item *item);
    void (*attend)(const KvrAttention *attention, const Item *item, const Item *next, void *scratch);
    void (*merge)(const KvrAttention *attention, const Item *item, void *scratch);
    bool (*multiply)(const KvrGemm *gemm, int64_t first_panel, int64_t last_panel, void *scratch);
    void (*quantize)(const void *x, int32_t bf16, uint8_t *out, float *scales, int64_t width, int64_t stride,
                     int64_t first, int64_t last);
    int64_t (*highest_allowed)(const float *x, const uint32_t *words, int64_t width);
};

// Columns of a panel of weights; memory for the sums of 96 rows, and for 128 steps of a panel that are widened.
constexpr int COLUMNS = 64;
constexpr size_t GEMM_SCRATCH = (96 + 512) * COLUMNS * 4;

// Context is cut at multiples of this position, whatever the batch: each segment has its own softmax, and the results
// are merged in order. So a query's result does not depend on how work was divided.
constexpr int SEGMENT = 128, MAX_ROWS = 256;

// An item has as many queries, and then as many KV heads, as fill MAX_ROWS rows of (KV head, query, head of its group).
static inline int64_t fitting(int64_t rows_of_each) { return rows_of_each >= MAX_ROWS ? 1 : MAX_ROWS / rows_of_each; }

const KernelTable *kvr_table_baseline();
const KernelTable *kvr_table_avx2();
const KernelTable *kvr_table_avx512();
const KernelTable *kvr_table_avx512_vnni();
const KernelTable *kvr_table_avx512_bf16();
