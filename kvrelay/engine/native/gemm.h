// Small-batch GEMMs with a packed weight, and GEMMs of any size with an int8 weight. For isa.cpp only.
//
// A weight is packed in panels of 64 columns [in / DEPTH][64][DEPTH], the layout that oneDNN uses on AVX-512. It is
// read once, sequentially, with prefetching. DEPTH elements of a row are one step. A slab of so many steps is summed from
// the first to the last in one accumulator and then added to the sum of the slabs before it, for any number of rows.
#pragma once

#include "terms.h"

namespace {

constexpr int STEP_BYTES = 4 * COLUMNS;  // of a panel, but half of it or less where int8 is widened
constexpr int64_t ROWS_AT_ONCE = 96;     // whose sums stay in the first-level cache
constexpr int64_t WIDENED_ROWS = 24;     // up to which widening bf16 for each tile is faster than doing it once

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, SUMS = 24;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 6, SUMS = 12;
#else
constexpr int TILE_ROWS = 4, SUMS = 8;
#endif

// How many vectors of columns a tile of so many rows has, so that its sums fill the registers, but not all of them.
INLINE constexpr int vectors_of(int rows) {
    int vectors = 2;
    while (2 * vectors * rows <= SUMS && 2 * vectors * W <= COLUMNS) vectors *= 2;
    return vectors;
}

// sums[r][0:vectors * W] of R rows, from steps steps of a panel, stored or added to what is there. LINES: how many
// cache lines of what comes next in memory are sent for with each step.
template <typename P, int R, int LINES>
__attribute__((noinline)) void multiply_tile(const typename P::Left *x, int64_t stride, const char *panel,
                                             int64_t steps, float *sums, bool add, const char *next) {
    constexpr int N = vectors_of(R);
    typename P::Sum acc[R][N] = {};
    for (int64_t k = 0; k < steps; k++, panel += STEP_BYTES, x += P::DEPTH, next += 64 * LINES) {
#pragma GCC unroll 4
        for (int line = 0; line < LINES; line++) __builtin_prefetch(next + 64 * line, 0, 2);
        if (R > 6)
            for (int n = 0; n < N; n++) __builtin_prefetch(panel + 4 * n * W + 4096, 0, 3);
#pragma GCC unroll 4
        for (int part = 0; part < P::PARTS; part++) {
            typename P::Weights weights[N];
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) weights[n] = P::weights(panel + 4 * n * W, part);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                const typename P::Row row = P::row(x + r * stride, part);
#pragma GCC unroll 16
                for (int n = 0; n < N; n++) acc[r][n] = P::add(acc[r][n], row, weights[n]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float *to = sums + r * COLUMNS + n * W;
            store(to, (vf)(add ? acc[r][n] + (typename P::Sum)load(to) : acc[r][n]));
        }
}

// A slab of a panel, and what comes next in memory: its beginning, and how many cache lines of it belong to each step.
struct Slab {
    const char *panel;
    int64_t steps;
    const char *next;
    int64_t lines;

    // Send for that part of what comes next which belongs to one of so many passes; returns how many lines a step.
    int lines_of(int64_t pass, int64_t passes, const char **from) const {
        const int64_t each = (lines + passes - 1) / passes;
        if (!each || pass >= lines / each) return 0;
        *from = next + 64 * each * steps * pass;
        return (int)each;
    }
};

template <typename P, int R>
void multiply_rows(const typename P::Left *x, int64_t stride, const Slab &slab, float *sums, bool add, int64_t tile,
                   int64_t tiles) {
    constexpr int width = vectors_of(R) * W, parts = COLUMNS / width;
    for (int part = 0; part < parts; part++) {
        const char *panel = slab.panel + 4 * width * part, *next = nullptr;
        float *to = sums + width * part;
        switch (slab.lines_of(tile * parts + part, tiles * parts, &next)) {
            case 0: multiply_tile<P, R, 0>(x, stride, panel, slab.steps, to, add, next); break;
            case 1: multiply_tile<P, R, 1>(x, stride, panel, slab.steps, to, add, next); break;
            case 2: multiply_tile<P, R, 2>(x, stride, panel, slab.steps, to, add, next); break;
            default: multiply_tile<P, R, 4>(x, stride, panel, slab.steps, to, add, next);
        }
    }
}

// Any number of rows, in tiles as alike as can be.
template <typename P>
void multiply_slab(const typename P::Left *x, int64_t num_rows, int64_t stride, const Slab &slab, float *sums,
                   bool add) {
    const int64_t tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t end = num_rows * (tile + 1) / tiles;
#define CASE(R) \
    case R: multiply_rows<P, R>(x + row * stride, stride, slab, sums + row * COLUMNS, add, tile, tiles); break;
        switch (end - row) {
            CASE(1) CASE(2) CASE(3) CASE(4)
#if defined(__AVX2__)
            CASE(5) CASE(6)
#endif
#if defined(__AVX512F__)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
#undef CASE
        row = end;
    }
}

// A slab of int8 weights as the type they are multiplied in: whole numbers up to 127 are exact in either.
INLINE void widen(const int8_t *from, int64_t steps, float *to, FloatTerms) {
    for (int64_t i = 0; i < steps * COLUMNS; i++) to[i] = from[i];
}
// Pairs of bf16 as two steps of float32; there is an even number of steps.
INLINE void widen(const uint16_t *from, int64_t steps, float *to, FloatTerms) {
    for (int64_t k = 0; k < steps; k += 2, from += 2 * COLUMNS, to += 2 * COLUMNS)
        for (int n = 0; n < COLUMNS; n += W)
            for (int part = 0; part < 2; part++)
                store(to + part * COLUMNS + n, WidenedTerms::weights((const char *)(from + 2 * n), part));
}
#if defined(__AVX512BF16__)
// The upper and lower bytes of the bf16 of 0 to 127, looked up 64 at a time.
struct WholeNumbers {
    alignas(64) uint8_t upper[128] = {}, lower[128] = {}, order[128] = {};
    constexpr WholeNumbers() {
        for (int i = 0; i < 128; i++) {
            int exponent = 0;
            while (i >> (exponent + 1)) exponent++;
            const int bits = i ? (127 + exponent) << 7 | (i << (7 - exponent) & 0x7f) : 0;
            upper[i] = (uint8_t)(bits >> 8), lower[i] = (uint8_t)bits;
            order[i] = (uint8_t)(i / 2 + 64 * (i % 2));  // interleaves 64 lower bytes with 64 upper ones
        }
    }
};
constexpr WholeNumbers whole_numbers;  // made by the compiler: nothing of this file may run unasked on a lesser CPU

INLINE void widen(const int8_t *from, int64_t steps, float *to, HalfTerms) {
    const WholeNumbers &w = whole_numbers;
    const __m512i upper = _mm512_load_si512(w.upper), upper2 = _mm512_load_si512(w.upper + 64);
    const __m512i lower = _mm512_load_si512(w.lower), lower2 = _mm512_load_si512(w.lower + 64);
    const __m512i first = _mm512_load_si512(w.order), second = _mm512_load_si512(w.order + 64);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (int64_t i = 0; i < 2 * steps * COLUMNS; i += 64, to += 2 * W) {
        __builtin_prefetch(from + i + 8192, 0, 2);
        const __m512i v = _mm512_loadu_si512(from + i), size = _mm512_abs_epi8(v);
        const __m512i low = _mm512_permutex2var_epi8(lower, size, lower2);
        const __m512i high = _mm512_permutex2var_epi8(upper, size, upper2);
        const __m512i with_sign = _mm512_ternarylogic_epi32(high, v, sign, 0xf8);  // high | (v & sign)
        _mm512_storeu_si512(to, _mm512_permutex2var_epi8(low, first, with_sign));
        _mm512_storeu_si512(to + W, _mm512_permutex2var_epi8(low, second, with_sign));
    }
}
#endif

INLINE vf scaled(const KvrGemm *p, const float *sums, int64_t row, int64_t column) {
    vf v = load(sums);
    if (p->row_scales) {
        const vi sum = (vi)v;
        v = __builtin_convertvector(ByteTerms::IS_SIGNED ? sum : sum - load_ints(p->offsets + column), vf);
    }
    if (p->scales) v *= load(p->scales + column);
    if (p->row_scales) v *= p->row_scales[row];
    return p->bias ? v + load(p->bias + column) : v;
}

// Sums of rows [first, first + count) in columns [column, column + COLUMNS), scaled and biased, become results.
template <typename T>
void finish_rows(const KvrGemm *p, const float *sums, int64_t first, int64_t count, int64_t column) {
    const int64_t width = p->size_out - column < COLUMNS ? p->size_out - column : COLUMNS;
    for (int64_t r = 0; r < count; r++, sums += COLUMNS) {
        T *out = (T *)p->out + (first + r) * p->size_out + column;
        for (int64_t i = 0; i < width; i += W) {
            vf v = scaled(p, sums + i, first + r, column + i);
            if (i + W <= width) {
                store(out + i, p->accumulate ? load(out + i) + v : v);
            } else {
                for (int64_t j = 0; i + j < width; j++)
                    put(out + i + j, p->accumulate ? to_float(out[i + j]) + v[j] : v[j]);
            }
        }
    }
}

// How the weights of a GEMM lie in memory: as P multiplies them, or narrower, to be widened a slab at a time.
// BYTES: of a panel for one step of P.
template <typename P>
struct AsMultiplied {
    enum { BYTES = STEP_BYTES, IS_NARROW = 0 };
    typedef char Element;
};
template <typename P>
struct NarrowBytes {
    enum { BYTES = COLUMNS * P::DEPTH, IS_NARROW = 1 };
    typedef int8_t Element;
};
template <typename P>
struct NarrowHalves {
    enum { BYTES = 2 * COLUMNS * P::DEPTH, IS_NARROW = 1 };
    typedef uint16_t Element;
};

// Panels [first, last) of GEMM p, whose panel_steps and slab are scale steps of P each.
template <typename P, template <typename> class Held = AsMultiplied>
void multiply_panels_of(const KvrGemm *p, int64_t first, int64_t last, float *memory, int64_t scale = 1) {
    constexpr int64_t step_bytes = Held<P>::BYTES;
    float *sums = memory, *wide = memory + ROWS_AT_ONCE * COLUMNS;
    const int64_t steps = (p->size_in + P::DEPTH - 1) / P::DEPTH, slab = p->slab * scale;
    const int64_t panel_bytes = p->panel_steps * scale * step_bytes;
    for (int64_t panel = first; panel < last; panel++) {
        const char *weights = (const char *)p->weights + panel * panel_bytes;
        for (int64_t row = 0; row < p->num_rows; row += ROWS_AT_ONCE) {
            const int64_t count = p->num_rows - row < ROWS_AT_ONCE ? p->num_rows - row : ROWS_AT_ONCE;
            const typename P::Left *x = (const typename P::Left *)p->x + row * p->x_stride;
            for (int64_t k = 0; k < steps; k += slab) {
                const int64_t here = steps - k < slab ? steps - k : slab;
                const char *part = weights + k * step_bytes, *next = part + here * step_bytes;
                if constexpr (Held<P>::IS_NARROW) {
                    widen((const typename Held<P>::Element *)part, here, wide, P());
                    part = (const char *)wide;
                }
                const Slab at{part, here, next, row > 0 ? 0 : step_bytes / 64};
                multiply_slab<P>(x + k * P::DEPTH, count, p->x_stride, at, sums, k > 0);
            }
            if (p->out_bf16)
                finish_rows<uint16_t>(p, sums, row, count, panel * COLUMNS);
            else
                finish_rows<float>(p, sums, row, count, panel * COLUMNS);
        }
    }
}

// Float32 by bf16: few rows widen what they multiply; for many it is widened once, and the same sums are as many bits.
void multiply_widened(const KvrGemm *p, int64_t first, int64_t last, float *memory) {
    if (p->num_rows <= WIDENED_ROWS)
        multiply_panels_of<WidenedTerms>(p, first, last, memory);
    else
        multiply_panels_of<FloatTerms, NarrowHalves>(p, first, last, memory, WidenedTerms::DEPTH);
}

// False if this instruction set has nothing for the GEMM's kind.
bool multiply(const KvrGemm *p, int64_t first, int64_t last, void *memory) {
    float *at = (float *)memory;
    switch (p->kind) {
        case KVR_FLOATS: multiply_panels_of<FloatTerms>(p, first, last, at); return true;
        case KVR_FLOATS_BY_INT8: multiply_panels_of<FloatTerms, NarrowBytes>(p, first, last, at); return true;
        case KVR_FLOATS_BY_HALVES: multiply_widened(p, first, last, at); return true;
        case KVR_INT8: multiply_panels_of<ByteTerms>(p, first, last, at); return true;
#if defined(__AVX512BF16__)
        case KVR_HALVES: multiply_panels_of<HalfTerms>(p, first, last, at); return true;
        case KVR_HALVES_BY_INT8: multiply_panels_of<HalfTerms, NarrowBytes>(p, first, last, at); return true;
#endif
        default: return false;
    }
}

// To a whole number: adding 1.5 * 2^23 rounds to one.
INLINE vi rounded(vf v) { return __builtin_convertvector(v + 12582912.0f - 12582912.0f, vi); }

// Rows [first, last) of x [rows, width] as uint8: 128 is zero, the element furthest from it is 127 away. The scale of a
// row that has an element which is not finite is not a number.
template <typename T>
void quantize_rows_of(const T *x, uint8_t *out, float *scales, int64_t width, int64_t stride, int64_t first,
                      int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const T *from = x + row * width;
        uint8_t *to = out + row * stride;
        vf furthest = {}, nothing = {};
        int64_t i = 0;
        for (; i + W <= width; i += W) {
            vf v = load(from + i), away = v < 0 ? -v : v;
            furthest = away > furthest ? away : furthest;
            nothing += v * 0.0f;
        }
        float highest = highest_of(furthest), none = sum_of(nothing);
        for (; i < width; i++) {
            const float v = to_float(from[i]);
            highest = fabsf(v) > highest ? fabsf(v) : highest;
            none += v * 0.0f;
        }
        scales[row] = highest / 127.0f + none;
        const float factor = highest > 0 ? 127.0f / highest : 0.0f;
        for (i = 0; i + W <= width; i += W) store_bytes(to + i, rounded(load(from + i) * factor) + 128);
        for (; i < width; i++) to[i] = (uint8_t)(rounded(splat(to_float(from[i]) * factor))[0] + 128);
        for (; i < stride; i++) to[i] = 128;
    }
}

void quantize(const void *x, int32_t bf16, uint8_t *out, float *scales, int64_t width, int64_t stride, int64_t first,
              int64_t last) {
    if (bf16)
        quantize_rows_of((const uint16_t *)x, out, scales, width, stride, first, last);
    else
        quantize_rows_of((const float *)x, out, scales, width, stride, first, last);
}

}  // namespace
