// The C interface of the library: choice of the instruction set, division of work over threads.

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"

#if !defined(KVR_X86)
const KernelTable *kvr_table_avx2() { return nullptr; }
const KernelTable *kvr_table_avx512() { return nullptr; }
const KernelTable *kvr_table_avx512_vnni() { return nullptr; }
const KernelTable *kvr_table_avx512_bf16() { return nullptr; }
#endif

namespace {

// GOMP_parallel of the OpenMP library that oneDNN uses, so that both share one set of threads; null: one thread.
typedef void (*RunParallel)(void (*function)(void *), void *data, unsigned num_threads, unsigned flags);
RunParallel run_parallel = nullptr;
int num_threads = 1;

// The highest level that ONEDNN_MAX_CPU_ISA allows, so that the one variable limits oneDNN and this library alike.
int allowed_level() {
    const char *name = getenv("ONEDNN_MAX_CPU_ISA");
    if (name == nullptr) return 4;
    const std::string isa = name;
    if (isa == "SSE41" || isa == "AVX") return 0;
    if (isa.rfind("AVX2", 0) == 0) return 1;
    if (isa == "AVX512_CORE") return 2;
    return isa == "AVX512_CORE_VNNI" ? 3 : 4;
}

bool supports(int level) {
    static const int allowed = allowed_level();
    if (level > allowed) return false;
#if defined(KVR_X86)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    bool bf16 = vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    const bool levels[] = {true, avx2, avx512, vnni, bf16};
    return levels[level];
#else
    return level == 0;
#endif
}

const KernelTable *table_of(int level) {
    const KernelTable *(*tables[])() = {kvr_table_baseline, kvr_table_avx2, kvr_table_avx512, kvr_table_avx512_vnni,
                                        kvr_table_avx512_bf16};
    return supports(level) ? tables[level]() : nullptr;
}

const KernelTable *best_table(int highest) {
    for (int level = highest; level > 0; level--)
        if (const KernelTable *table = table_of(level)) return table;
    return table_of(0);
}

const KernelTable *table = best_table(4);

// Memory a thread keeps from call to call.
struct Memory {
    void *data = nullptr;
    size_t size = 0;
    ~Memory() { free(data); }
    void *at_least(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = aligned_alloc(4096, size);
        }
        return data;
    }
};
thread_local Memory scratch, partials;
thread_local std::vector<Item> items;
thread_local std::vector<size_t> split;

template <typename F>
struct Job {
    const F &function;
    int64_t count;
    std::atomic<int64_t> next{0};

    static void work(void *data) {
        Job *job = (Job *)data;
        for (int64_t i; (i = job->next.fetch_add(1, std::memory_order_relaxed)) < job->count;) job->function(i);
    }
};

// Call function(i) for each i below count, on as many threads as there are.
template <typename F>
void for_each(int64_t count, const F &function) {
    if (num_threads == 1 || count < 2 || !run_parallel) {
        for (int64_t i = 0; i < count; i++) function(i);
        return;
    }
    Job<F> job{function, count};
    run_parallel(Job<F>::work, &job, (unsigned)std::min<int64_t>(num_threads, count), 0);
}

// Call function(first, last) for parts of rows [0, count), in parallel if they have enough elements to be worth it.
template <typename F>
void for_rows(int64_t count, int64_t width, const F &function) {
    int64_t per_part = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
    int64_t parts = std::min<int64_t>((count + per_part - 1) / per_part, 4 * num_threads);
    if (parts < 2 || num_threads == 1) return function(0, count);
    for_each(parts, [&](int64_t i) { function(count * i / parts, count * (i + 1) / parts); });
}

// Fill items; returns how many segments they have together.
int64_t list_items(const KvrAttention *a) {
    const int64_t group = a->num_heads / a->num_kv_heads, per_item = fitting(group);
    int64_t segments = 0;
    items.clear();
    for (int64_t s = 0; s < a->num_sequences; s++) {
        int64_t num_queries = a->sequences[4 * s + 1], start = a->sequences[4 * s + 2];
        for (int64_t first = 0; first < num_queries; first += per_item) {
            int64_t count = std::min(per_item, num_queries - first);
            int64_t end = start + first + count;
            int64_t oldest = a->window ? std::max<int64_t>(0, start + first - a->window + 1) : 0;
            const int64_t heads_per_item = fitting(count * group);
            for (int64_t head = 0; head < a->num_kv_heads; head += heads_per_item) {
                int64_t heads = std::min(heads_per_item, a->num_kv_heads - head);
                int64_t last_segment = (end + SEGMENT - 1) / SEGMENT;
                items.push_back(Item{s, head, heads, first, count, oldest / SEGMENT, last_segment, nullptr});
                segments += last_segment - oldest / SEGMENT;
            }
        }
    }
    return segments;
}

// Cut contexts so long that they would keep one thread busy while others wait: item i of split owns partial results.
void split_items(const KvrAttention *a, int64_t segments, std::vector<Item> &pieces) {
    int64_t longest = std::max<int64_t>(1, segments / (4 * num_threads));
    split.clear();
    size_t floats = 0;
    for (const Item &item : items) {
        int64_t count = item.last_segment - item.first_segment;
        if (count > longest) floats += count * table->partial_floats(a, &item);
    }
    float *at = (float *)partials.at_least(floats * sizeof(float));
    for (size_t i = 0; i < items.size(); i++) {
        Item &item = items[i];
        if (item.last_segment - item.first_segment <= longest) {
            pieces.push_back(item);
            continue;
        }
        split.push_back(i);
        item.partials = at;
        for (int64_t first = item.first_segment; first < item.last_segment; first += longest) {
            Item piece = item;
            piece.first_segment = first;
            piece.last_segment = std::min(first + longest, item.last_segment);
            piece.partials = at;
            at += (piece.last_segment - first) * table->partial_floats(a, &item);
            pieces.push_back(piece);
        }
    }
}

thread_local std::vector<Item> pieces;

}  // namespace

extern "C" {

// Interface version: the Python side refuses a library of another one.
int32_t kvr_version() { return 5; }

// Compute with threads threads, run by gomp_parallel (see RunParallel).
void kvr_set_threads(int32_t threads, void *gomp_parallel) {
    num_threads = gomp_parallel ? threads : 1;
    run_parallel = (RunParallel)gomp_parallel;
}

// Use nothing above level (0 baseline, 1 AVX2, 2 AVX-512, 3 with VNNI, 4 with bf16), if the CPU has that.
void kvr_limit_isa(int32_t level) { table = best_table(level); }

const char *kvr_isa() { return table->name; }

void kvr_embed(const int64_t *ids, const void *embedding, float *out, int64_t rows, int64_t width, int32_t bf16) {
    for_rows(rows, width, [&](int64_t first, int64_t last) {
        table->embed(ids, embedding, out, width, bf16, first, last);
    });
}

// out[i] = rms_norm(x[picked ? picked[i] : i])
void kvr_rms_norm(const float *x, const int64_t *picked, const float *weight, void *out, int64_t rows, int64_t width,
                  float eps, int32_t bf16) {
    for_rows(rows, width, [&](int64_t first, int64_t last) {
        table->rms_norm(x, picked, weight, eps, out, width, bf16, first, last);
    });
}

void kvr_silu_mul(const void *gate_up, void *out, int64_t rows, int64_t ffn, int32_t bf16) {
    for_rows(rows, 4 * ffn, [&](int64_t first, int64_t last) {
        table->silu_mul(gate_up, out, ffn, bf16, first, last);
    });
}

void kvr_heads(const KvrHeads *heads) {
    for_rows(heads->num_rows, 2 * (heads->num_heads + 2 * heads->num_kv_heads) * heads->head_dim,
             [&](int64_t first, int64_t last) { table->heads(heads, first, last); });
}

// Returns 0 if this CPU has nothing for the GEMM's kind.
int32_t kvr_multiply(const KvrGemm *gemm) {
    const int64_t panels = (gemm->size_out + COLUMNS - 1) / COLUMNS;
    const int64_t parts = num_threads == 1 ? 1 : std::min<int64_t>(panels, 4 * num_threads);
    std::atomic<bool> done{true};
    for_each(parts, [&](int64_t i) {
        void *memory = scratch.at_least(GEMM_SCRATCH);
        if (!table->multiply(gemm, panels * i / parts, panels * (i + 1) / parts, memory)) done = false;
    });
    return done;
}

// out [rows, stride] and scales [rows]: rows x [rows, width] as uint8, see gemm.h.
void kvr_quantize(const void *x, int32_t bf16, uint8_t *out, float *scales, int64_t rows, int64_t width,
                  int64_t stride) {
    for_rows(rows, 2 * width, [&](int64_t first, int64_t last) {
        table->quantize(x, bf16, out, scales, width, stride, first, last);
    });
}

// The first of the highest logits whose bits in words are set; -1 if none is above minus infinity.
int64_t kvr_highest_allowed(const float *logits, const uint32_t *words, int64_t width) {
    return table->highest_allowed(logits, words, width);
}

void kvr_attention(const KvrAttention *attention) {
    int64_t segments = list_items(attention);
    const std::vector<Item> *work = &items;
    split.clear();
    if (num_threads > 1 && (int64_t)items.size() < 4 * num_threads) {
        pieces.clear();
        split_items(attention, segments, pieces);
        work = &pieces;
    }
    const size_t bytes = table->attention_scratch(attention);
    const Item *list = work->data();
    const int64_t count = (int64_t)work->size();
    for_each(count, [=](int64_t i) {
        table->attend(attention, list + i, i + 1 < count ? list + i + 1 : nullptr, scratch.at_least(bytes));
    });
    const Item *whole = items.data();
    const size_t *owners = split.data();
    for_each((int64_t)split.size(), [=](int64_t i) {
        table->merge(attention, whole + owners[i], scratch.at_least(bytes));
    });
}
}
