// Ragged paged attention. For isa.cpp only.
//
// Scores and outputs are both products of a few rows with a packed matrix. Packed<T> says how T is multiplied.

#pragma once

#include "vectors.h"

namespace {

template <typename T>
struct Packed : Floats {};
#if defined(__AVX512BF16__)
template <>
struct Packed<uint16_t> : Halves {};
#endif

// Has rows on their way from memory, one cache line with each call, while others are computed with. Spreading the calls
// evenly over time matters: a CPU has few requests under way at a time, and waits when there are more. So a decode step's
// are where its time is: 20 with W keys and 2 W dimensions, one with two values, 8 with a softmax.
struct Fetcher {
    const char *const *rows = nullptr;
    int64_t num_rows = 0, bytes = 0, row = 0, at = 0;

    INLINE_MEMBER void one() {
        if (row >= num_rows) return;
        __builtin_prefetch(rows[row] + at);
        at += 64;
        if (at >= bytes) at = 0, row++;
    }
    void finish() {
        while (row < num_rows) one();
    }
};

// out[r][0:PANEL] = sum over steps of rows[r] times panel [steps][PANEL]
template <typename T, int R>
INLINE void multiply(const typename Packed<T>::Left *const *rows, const float *panel, int64_t steps, float *out,
                     int64_t out_stride, Fetcher *fetcher) {
    vf acc[R][NB] = {};
    for (int64_t k = 0; k < steps; k++, panel += PANEL) {
        fetcher->one();
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int n = 0; n < NB; n++)
                acc[r][n] = Packed<T>::step(acc[r][n], rows[r] + k * Packed<T>::DEPTH, panel + n * W);
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NB; n++) store(out + r * out_stride + n * W, acc[r][n]);
}

// The same for num_panels panels, each panel_floats long.
template <typename T, int R>
__attribute__((noinline)) void multiply_panels(const typename Packed<T>::Left *const *rows, const float *panels,
                                               int64_t panel_floats, int64_t num_panels, int64_t steps, float *out,
                                               int64_t out_stride, Fetcher *fetcher) {
    for (int64_t p = 0; p < num_panels; p++)
        multiply<T, R>(rows, panels + p * panel_floats, steps, out + p * PANEL, out_stride, fetcher);
}

template <typename T>
void product(int num_rows, const typename Packed<T>::Left *const *rows, const float *panels, int64_t panel_floats,
             int64_t num_panels, int64_t steps, float *out, int64_t out_stride, Fetcher *fetcher) {
#define CASE(R)                                                                                                      \
    case R:                                                                                                          \
        if (R <= RB) multiply_panels<T, R>(rows, panels, panel_floats, num_panels, steps, out, out_stride, fetcher); \
        break;
    switch (num_rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
#undef CASE
}

INLINE vi lanes() {
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    return lane;
}

// Transpose a W x W square of 32-bit elements.
INLINE void transpose(vf *rows) {
    const vi lane = lanes();
#pragma GCC unroll 4
    for (int s = 1; s < W; s *= 2) {
        vi upper = (lane & s) != 0;  // all ones where the lane's bit s is set
        vi low = upper ? lane - s + W : lane, high = upper ? lane + W : lane + s;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & s)) {
                vf a = rows[i], b = rows[i + s];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + s] = __builtin_shuffle(a, b, high);
            }
    }
}

// Elements of a row of keys, each DEPTH values: W of them from first on, or one.
template <typename T>
INLINE vf key_elements(const T *row, int64_t first) {
    if (Packed<T>::DEPTH == 1) return load(row + first);
    vf v;
    memcpy(&v, row + 2 * first, sizeof v);
    return v;
}
template <typename T>
INLINE float key_element(const T *row, int64_t at) {
    if (Packed<T>::DEPTH == 1) return to_float(row[at]);
    float pair;
    memcpy(&pair, row + 2 * at, 4);
    return pair;
}

// Where the keys and values of a segment of context lie, from the item's first head on.
template <typename T>
struct Context {
    int64_t count = 0;
    const T *keys[2 * SEGMENT], **values;  // values: behind the keys, so that one list has all rows

    void find(const KvrAttention *a, const int32_t *blocks, int64_t kv_head, int64_t first, int64_t end) {
        const int64_t stride = a->num_kv_heads * a->head_dim, size = a->block_size;
        count = end - first < SEGMENT ? end - first : SEGMENT;
        values = keys + count;
        int64_t block = first / size, offset = first % size;
        for (int64_t k = 0; k < count; block++, offset = 0) {
            int64_t at = (blocks[block] * size + offset) * stride + kv_head * a->head_dim;
            for (; offset < size && k < count; offset++, k++, at += stride) {
                keys[k] = (const T *)a->keys + at;
                values[k] = (const T *)a->values + at;
            }
        }
    }
};

// Keys as panels of [head_dim / DEPTH][PANEL keys]. Those beyond the last are zero.
template <typename T>
__attribute__((noinline)) void pack_keys(const Context<T> &context, int64_t head, int64_t dim, Fetcher *fetcher,
                                         const T *zeros, float *out) {
    const int64_t steps = dim / Packed<T>::DEPTH, num_keys = context.count;
    const T *rows[SEGMENT + PANEL];
    int64_t padded = 0;
    for (; padded < num_keys; padded++) rows[padded] = context.keys[padded] + head * dim;
    for (; padded % PANEL; padded++) rows[padded] = zeros;
    for (int64_t key = 0; key < padded; key += W) {
        float *panel = out + key / PANEL * PANEL * steps + key % PANEL;
        int64_t first = 0;
        for (; first + W <= steps; first += W) {
            vf square[W];
            for (int i = 0; i < W / 2; i++) fetcher->one();
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) square[i] = key_elements(rows[key + i], first);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(panel + (first + i) * PANEL, square[i]);
        }
        for (; first < steps; first++)
            for (int i = 0; i < W; i++) panel[first * PANEL + i] = key_element(rows[key + i], first);
    }
}

// Values of two keys from dimension d on, as the product takes them.
INLINE vf value_elements(const float *first, const float *, int64_t d) { return load(first + d); }
INLINE vf value_elements(const uint16_t *first, const uint16_t *second, int64_t d) {
    if (Packed<uint16_t>::DEPTH == 2) return (vf)(load_halves(first + d) | load_halves(second + d) << 16);
    return load(first + d);
}

// The same for W dimensions or fewer, zero beyond.
template <typename T>
INLINE vf last_values(const T *first, const T *second, int64_t d, int64_t dim) {
    T one[W] = {}, two[W] = {};
    memcpy(one, first + d, (dim - d) * sizeof(T));
    memcpy(two, second + d, (dim - d) * sizeof(T));
    return value_elements(one, two, 0);
}

// Values as panels of [num_keys / DEPTH][PANEL dimensions]; dimensions beyond dim are zero.
template <typename T>
__attribute__((noinline)) void pack_values(const Context<T> &context, int64_t head, int64_t dim, Fetcher *fetcher,
                                           const T *zeros, float *out) {
    const int64_t num_keys = context.count, steps = (num_keys + Packed<T>::DEPTH - 1) / Packed<T>::DEPTH;
    const T *const *rows = context.values;
    for (int64_t k = 0; k < steps; k++, out += PANEL) {
        const T *first = rows[k * Packed<T>::DEPTH] + head * dim;
        const T *second = k * Packed<T>::DEPTH + 1 < num_keys ? rows[k * Packed<T>::DEPTH + 1] + head * dim : zeros;
        float *to = out;
        int64_t d = 0;
        for (; d + PANEL <= dim; d += PANEL, to += steps * PANEL, fetcher->one())
            for (int n = 0; n < NB; n++) store(to + n * W, value_elements(first, second, d + n * W));
        if (d == dim) continue;
        for (int n = 0; n < NB; n++, d += W) {
            vf v = d + W <= dim ? value_elements(first, second, d) : vf{};
            if (d < dim && d + W > dim) v = last_values(first, second, d, dim);
            store(to + n * W, v);
        }
    }
}

// Few rows, as in a decode step, are multiplied with keys and values where they lie: packing would cost more than the
// product. Each sum has the order of the packed product, and so its bits. dim must be a multiple of PANEL.
template <typename T>
struct Direct {
    static bool fits(int64_t, int64_t) { return false; }
    static void scores(int, const typename Packed<T>::Left *const *, const Context<T> &, int64_t, int64_t, const T *,
                       float *, Fetcher *) {}
    static void outputs(int, const typename Packed<T>::Left *const *, const Context<T> &, int64_t, int64_t, int64_t,
                        const T *, float *, Fetcher *) {}
};

#if defined(__AVX512BF16__)
template <>
struct Direct<uint16_t> {
    static bool fits(int64_t rows, int64_t dim) { return rows <= RB && dim % PANEL == 0; }

    // Of 2 W elements of two rows each, W of them from first on, as pairs.
    struct Interleaved {
        __m512i order;

        explicit Interleaved(int first) {
            uint16_t from[2 * W];
            for (int i = 0; i < 2 * W; i++) from[i] = first + i / 2 + i % 2 * 2 * W;
            order = _mm512_loadu_si512(from);
        }
        INLINE_MEMBER vf of(const uint16_t *one, const uint16_t *two, int64_t d) const {
            return (vf)_mm512_permutex2var_epi16(_mm512_loadu_si512(one + d), order, _mm512_loadu_si512(two + d));
        }
    };

    // out[r][0:W] = rows[r] times W keys
    template <int R>
    INLINE_MEMBER static void keys(const uint16_t *const *rows, const uint16_t *const *keys, int64_t dim, float *out,
                                   Fetcher *fetcher) {
        vf acc[R] = {};
        for (int64_t first = 0; first < dim / 2; first += W) {
            vf square[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                square[i] = key_elements(keys[i], first);
                fetcher->one();
                if (i % 4 == 0) fetcher->one();
            }
            transpose(square);
#pragma GCC unroll 16
            for (int j = 0; j < W; j++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) acc[r] = pair_step(acc[r], rows[r] + 2 * (first + j), square[j]);
        }
        for (int r = 0; r < R; r++) store(out + r * SEGMENT, acc[r]);
    }

    // out[r][0:PANEL] = rows[r] times PANEL dimensions, from d on, of count values
    template <int R>
    INLINE_MEMBER static void values(const uint16_t *const *rows, const uint16_t *const *values, int64_t d,
                                     int64_t count, const uint16_t *zeros, float *out, int64_t out_stride,
                                     Fetcher *fetcher) {
        vf acc[R][NB] = {};
        const Interleaved low(0), high(W);
        for (int64_t k = 0; k < count; k += 2) {
            const uint16_t *one = values[k] + d, *two = k + 1 < count ? values[k + 1] + d : zeros;
            fetcher->one();
#pragma GCC unroll 2
            for (int n = 0; n < NB; n++) {
                const vf v = n % 2 ? high.of(one, two, (n - 1) * W) : low.of(one, two, n * W);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) acc[r][n] = pair_step(acc[r][n], rows[r] + k, v);
            }
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < NB; n++) store(out + r * out_stride + n * W, acc[r][n]);
    }

    INLINE_MEMBER static vf pair_step(vf acc, const uint16_t *left, vf right) {
        int32_t pair;
        memcpy(&pair, left, 4);
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)right);
    }

    template <int R>
    __attribute__((noinline)) static void all_scores(const uint16_t *const *rows, const Context<uint16_t> &context,
                                                     int64_t shift, int64_t dim, const uint16_t *zeros, float *out,
                                                     Fetcher *fetcher) {
        const uint16_t *here[W];
        for (int64_t key = 0; key < context.count; key += W) {
            for (int i = 0; i < W; i++) here[i] = key + i < context.count ? context.keys[key + i] + shift : zeros;
            keys<R>(rows, here, dim, out + key, fetcher);
        }
    }

    template <int R>
    __attribute__((noinline)) static void all_outputs(const uint16_t *const *rows, const Context<uint16_t> &context,
                                                      int64_t shift, int64_t dim, int64_t seen, const uint16_t *zeros,
                                                      float *out, Fetcher *fetcher) {
        for (int64_t d = 0; d < dim; d += PANEL)
            values<R>(rows, context.values, shift + d, seen, zeros, out + d, dim, fetcher);
    }

#define EACH(CALL)                                                                              \
    switch (count) {                                                                            \
        case 1: CALL(1); break;                                                                 \
        case 2: CALL(2); break;                                                                 \
        case 3: CALL(3); break;                                                                 \
        case 4: CALL(4); break;                                                                 \
        case 5: CALL(5); break;                                                                 \
        case 6: CALL(6); break;                                                                 \
        case 7: CALL(7); break;                                                                 \
        case 8: CALL(8); break;                                                                 \
    }
#define SCORES(R) all_scores<R>(rows, context, shift, dim, zeros, out, fetcher)
#define OUTPUTS(R) all_outputs<R>(rows, context, shift, dim, seen, zeros, out, fetcher)
    static void scores(int count, const uint16_t *const *rows, const Context<uint16_t> &context, int64_t shift,
                       int64_t dim, const uint16_t *zeros, float *out, Fetcher *fetcher) {
        EACH(SCORES)
    }
    static void outputs(int count, const uint16_t *const *rows, const Context<uint16_t> &context, int64_t shift,
                        int64_t dim, int64_t seen, const uint16_t *zeros, float *out, Fetcher *fetcher) {
        EACH(OUTPUTS)
    }
#undef EACH
#undef SCORES
#undef OUTPUTS
};
#endif

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Running result of some rows: highest score, sum of weights, weighted sum of values.
struct Rows {
    float *highest, *total, *sums;
};

// Memory of one item, carved from the thread's scratch.
struct Scratch {
    float *keys, *values, *left, *scores, *outputs;
    uint16_t *weights;
    char *zeros;
    Rows rows;
};

INLINE int64_t rows_per_item(const KvrAttention *a) {
    int64_t group = a->num_heads / a->num_kv_heads;
    return group > MAX_ROWS ? group : MAX_ROWS;
}

size_t attention_scratch(const KvrAttention *a) {
    int64_t dim = round_up(a->head_dim, PANEL), rows = rows_per_item(a);
    return 4 * (2 * SEGMENT * dim + rows * dim + RB * SEGMENT * 2 + RB * dim + rows * (dim + 2) + dim) + 4096;
}

INLINE float *carve(char **at, int64_t floats) {
    float *here = (float *)*at;
    *at += round_up(4 * floats, 64);
    return here;
}

INLINE Scratch carved(const KvrAttention *a, void *memory) {
    char *at = (char *)memory;
    int64_t dim = round_up(a->head_dim, PANEL), rows = rows_per_item(a);
    Scratch s;
    s.keys = carve(&at, SEGMENT * dim);
    s.values = carve(&at, SEGMENT * dim);
    s.left = carve(&at, rows * dim);
    s.scores = carve(&at, RB * SEGMENT);
    s.weights = (uint16_t *)carve(&at, RB * SEGMENT);
    s.outputs = carve(&at, RB * dim);
    s.rows.highest = carve(&at, rows);
    s.rows.total = carve(&at, rows);
    s.rows.sums = carve(&at, rows * dim);
    s.zeros = (char *)carve(&at, dim);
    memset(s.zeros, 0, 4 * dim);
    return s;
}

// A segment's result for one row joins what earlier segments gave. One function, so that it always rounds alike.
__attribute__((noinline)) void merge_row(const Rows *into, int64_t row, int64_t dim, float highest, float total,
                                         const float *sums) {
    if (highest == -INFINITY) return;
    float before = into->highest[row], top = before > highest ? before : highest;
    float keep = exp2_of(splat(before - top))[0], add = exp2_of(splat(highest - top))[0];
    into->highest[row] = top;
    into->total[row] = into->total[row] * keep + total * add;
    float *to = into->sums + row * dim;
    for (int64_t d = 0; d < dim; d += W) store(to + d, load(to + d) * keep + load(sums + d) * add);
}

// weights[0:count] = 2^(scale * score - highest) within [low, high), else 0, and what they sum up to.
template <typename Left>
__attribute__((noinline)) void soften(float *scores, int64_t count, int64_t low, int64_t high, float scale,
                                      Left *weights, float *highest, float *total) {
    vf top = splat(-INFINITY);
    for (int64_t k = 0; k < count; k += W) {
        vf v = load(scores + k);
        if (k < low || k + W > high) {
            vi position = lanes() + (int32_t)k;
            v = (position >= (int32_t)low) & (position < (int32_t)high) ? v : splat(-INFINITY);
            store(scores + k, v);
        }
        top = v > top ? v : top;
    }
    const float best = highest_of(top) * scale;
    *highest = best;
    if (best == -INFINITY) {
        for (int64_t k = 0; k < count; k += W) store(weights + k, vf{});
        *total = 0;
        return;
    }
    vf sum = {};
    for (int64_t k = 0; k < count; k += W) {
        vf e = exp2_of(load(scores + k) * scale - best);
        sum += e;
        store(weights + k, e);
    }
    *total = sum_of(sum);
}

// A query as the product takes it: as it is, or converted to float32 in space.
INLINE const float *left_row(const float *query, float *, int64_t) { return query; }
#if defined(__AVX512BF16__)
INLINE const uint16_t *left_row(const uint16_t *query, float *, int64_t) { return query; }
#else
INLINE const float *left_row(const uint16_t *query, float *space, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) space[d] = to_float(query[d]);
    return space;
}
#endif

template <typename T>
INLINE void finish_row(const Rows *rows, int64_t row, int64_t padded, int64_t dim, T *out) {
    float factor = 1.0f / rows->total[row];
    const float *sums = rows->sums + row * padded;
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(out + d, load(sums + d) * factor);
    for (; d < dim; d++) put(out + d, sums[d] * factor);
}

// How an item's rows lie: KV head by KV head, query by query, and for each the heads of the group.
struct Span {
    int64_t first_row, start, group, rows_per_head, num_rows;
    const int32_t *blocks;
};

INLINE Span span_of(const KvrAttention *a, const Item *item) {
    const int64_t *sequence = a->sequences + 4 * item->sequence;
    int64_t group = a->num_heads / a->num_kv_heads, rows = item->num_queries * group;
    return Span{sequence[0], sequence[2], group, rows, rows * item->num_heads, (const int32_t *)sequence[3]};
}

INLINE int64_t element_of(const KvrAttention *a, const Item *item, const Span &span, int64_t row) {
    int64_t kv_head = item->first_head + row / span.rows_per_head, within = row % span.rows_per_head;
    int64_t query = span.first_row + item->first_query + within / span.group;
    return (query * a->num_heads + kv_head * span.group + within % span.group) * a->head_dim;
}

INLINE void reset(const Rows *rows, int64_t num_rows, int64_t padded) {
    for (int64_t r = 0; r < num_rows; r++) rows->highest[r] = -INFINITY, rows->total[r] = 0;
    memset(rows->sums, 0, 4 * num_rows * padded);
}

// One item at work.
template <typename T>
struct Attend {
    typedef typename Packed<T>::Left Left;
    const KvrAttention *a;
    const Item *item, *next;  // next: what will probably be computed after item, or null
    const Scratch s;
    const Span span;
    const int64_t dim, padded, first_position;
    const Left *left[MAX_ROWS + RB];
    Context<T> contexts[2];
    Fetcher fetcher;

    Attend(const KvrAttention *attention, const Item *of, const Item *after, void *memory)
        : a(attention), item(of), next(after), s(carved(attention, memory)), span(span_of(attention, of)),
          dim(attention->head_dim), padded(round_up(dim, PANEL)), first_position(span.start + of->first_query) {}

    void run() {
        for (int64_t r = 0; r < span.num_rows; r++)
            left[r] = left_row((const T *)a->queries + element_of(a, item, span, r), s.left + r * dim, dim);
        if (!item->partials) reset(&s.rows, span.num_rows, padded);
        find(item, item->first_segment, contexts[item->first_segment % 2]);
        float *partial = item->partials;
        for (int64_t segment = item->first_segment; segment < item->last_segment; segment++) {
            Context<T> &ahead = contexts[(segment + 1) % 2];
            const Item *of = segment + 1 < item->last_segment ? item : next;
            if (of) {
                find(of, of == item ? segment + 1 : of->first_segment, ahead);
                const int64_t bytes = of->num_heads * dim * (int64_t)sizeof(T);
                fetcher = Fetcher{(const char *const *)ahead.keys, 2 * ahead.count, bytes, 0, 0};
            }
            for (int64_t head = 0; head < item->num_heads; head++) {
                if (!direct()) pack(segment, head);
                for (int64_t r = 0; r < span.rows_per_head; r += RB) {
                    int64_t row = head * span.rows_per_head + r, count = span.rows_per_head - r;
                    block(segment, head, row, r, (int)(count < RB ? count : RB), partial);
                }
            }
            fetcher.finish();
            if (partial) partial += span.num_rows * (padded + 2);
        }
        if (item->partials) return;
        for (int64_t r = 0; r < span.num_rows; r++)
            finish_row(&s.rows, r, padded, dim, (T *)a->out + element_of(a, item, span, r));
    }

    void find(const Item *of, int64_t segment, Context<T> &context) {
        const Span where = span_of(a, of);
        context.find(a, where.blocks, of->first_head, segment * SEGMENT,
                     where.start + of->first_query + of->num_queries);
    }

    void pack(int64_t segment, int64_t head) {
        const Context<T> &here = contexts[segment % 2];
        pack_keys(here, head, dim, &fetcher, (const T *)s.zeros, s.keys);
        pack_values(here, head, dim, &fetcher, (const T *)s.zeros, s.values);
    }

    bool direct() const { return Direct<T>::fits(span.rows_per_head, dim); }

    // Rows [row, row + count), which are [r, r + count) of their KV head, over a segment.
    void block(int64_t segment, int64_t head, int64_t row, int64_t r, int count, float *partial) {
        const int64_t first_key = segment * SEGMENT, num_keys = contexts[segment % 2].count;
        const int64_t newest = first_position + (r + count - 1) / span.group;
        const int64_t oldest = a->window ? first_position + r / span.group - a->window + 1 : 0;
        int64_t seen = newest + 1 - first_key < num_keys ? newest + 1 - first_key : num_keys;
        if (oldest >= first_key + SEGMENT) seen = 0;
        float highest[RB], total[RB];
        for (int i = 0; i < count; i++) highest[i] = -INFINITY, total[i] = 0;
        if (seen > 0) compute(segment, head, seen, row, r, count, highest, total);
        for (int i = 0; i < count; i++) {
            if (partial) {
                float *to = partial + (row + i) * (padded + 2);
                to[0] = highest[i], to[1] = total[i];
                memcpy(to + 2, s.outputs + i * padded, 4 * padded);
            } else {
                merge_row(&s.rows, row + i, padded, highest[i], total[i], s.outputs + i * padded);
            }
        }
    }

    void compute(int64_t segment, int64_t head, int64_t seen, int64_t row, int64_t r, int count, float *highest,
                 float *total) {
        const int64_t depth = Packed<T>::DEPTH, key_steps = dim / depth, first_key = segment * SEGMENT;
        const Context<T> &here = contexts[segment % 2];
        const T *zeros = (const T *)s.zeros;
        Left *weights = sizeof(Left) == 2 ? (Left *)s.weights : (Left *)s.scores;
        const Left *weight_rows[RB];
        if (direct())
            Direct<T>::scores(count, left + row, here, head * dim, dim, zeros, s.scores, &fetcher);
        else
            product<T>(count, left + row, s.keys, key_steps * PANEL, (seen + PANEL - 1) / PANEL, key_steps, s.scores,
                       SEGMENT, &fetcher);
        for (int i = 0; i < count; i++) {
            const int64_t position = first_position + (r + i) / span.group;
            const int64_t first_seen = a->window ? position - a->window + 1 : 0;
            const int64_t low = first_seen > first_key ? first_seen - first_key : 0;
            const int64_t high = position + 1 - first_key < seen ? position + 1 - first_key : seen;
            weight_rows[i] = weights + i * SEGMENT;
            for (int j = 0; j < 8; j++) fetcher.one();
            soften(s.scores + i * SEGMENT, round_up(seen, W), low, high, a->scale * LOG2_E, weights + i * SEGMENT,
                   highest + i, total + i);
        }
        if (direct())
            Direct<T>::outputs(count, weight_rows, here, head * dim, dim, seen, zeros, s.outputs, &fetcher);
        else
            product<T>(count, weight_rows, s.values, (here.count + depth - 1) / depth * PANEL, padded / PANEL,
                       (seen + depth - 1) / depth, s.outputs, padded, &fetcher);
    }
};

void attend(const KvrAttention *a, const Item *item, const Item *next, void *scratch) {
    if (a->bf16)
        Attend<uint16_t>(a, item, next, scratch).run();
    else
        Attend<float>(a, item, next, scratch).run();
}

size_t partial_floats(const KvrAttention *a, const Item *item) {
    return span_of(a, item).num_rows * (round_up(a->head_dim, PANEL) + 2);
}

// Join the partial results of all segments of item, in order.
void merge(const KvrAttention *a, const Item *item, void *memory) {
    const Scratch s = carved(a, memory);
    const Span span = span_of(a, item);
    const int64_t dim = a->head_dim, padded = round_up(dim, PANEL);
    reset(&s.rows, span.num_rows, padded);
    const float *partial = item->partials;
    for (int64_t segment = item->first_segment; segment < item->last_segment; segment++)
        for (int64_t r = 0; r < span.num_rows; r++, partial += padded + 2)
            merge_row(&s.rows, r, padded, partial[0], partial[1], partial + 2);
    for (int64_t r = 0; r < span.num_rows; r++) {
        int64_t at = element_of(a, item, span, r);
        if (a->bf16)
            finish_row(&s.rows, r, padded, dim, (uint16_t *)a->out + at);
        else
            finish_row(&s.rows, r, padded, dim, (float *)a->out + at);
    }
}

}  // namespace
