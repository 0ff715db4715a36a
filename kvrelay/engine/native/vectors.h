// Vectors of floats, the compiler's own, W wide, and what is done with them. For isa.cpp only.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, NB = 2, RB = 8;
#elif defined(__AVX2__)
constexpr int W = 8, NB = 2, RB = 6;
#else
constexpr int W = 4, NB = 2, RB = 4;
#endif
constexpr int PANEL = NB * W;  // columns a block of the matrix product computes at a time

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vu load_halves(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#else
    vh h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vu);
#endif
}
INLINE vf load(const uint16_t *p) { return (vf)(load_halves(p) << 16); }
INLINE void store(uint16_t *p, vf v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    vu u = (vu)v;
    vu upper = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    __m256i h = _mm512_cvtepi32_epi16((__m512i)upper);
#else
    vh h = __builtin_convertvector(upper, vh);
#endif
#endif
    memcpy(p, &h, sizeof h);
}

INLINE vi load_ints(const int32_t *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_bytes(uint8_t *p, vi v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    vb bytes = __builtin_convertvector(v, vb);
    memcpy(p, &bytes, sizeof bytes);
#endif
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}
INLINE void put(float *p, float x) { *p = x; }
INLINE void put(uint16_t *p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    *p = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE vf splat(float x) { return x - (vf){}; }

INLINE float sum_of(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
#endif
}
INLINE float highest_of(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float highest = v[0];
    for (int i = 1; i < W; i++) highest = v[i] > highest ? v[i] : highest;
    return highest;
#endif
}

constexpr float LOG2_E = 1.44269504f;  // e^x is 2^(x * LOG2_E)

// 2^x to 2e-7 of it; 0 below -126, minus infinity included; NaN stays NaN.
INLINE vf exp2_of(vf x) {
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
#else
    vf clamped = x < -126.0f ? splat(-126.0f) : (x > 127.0f ? splat(127.0f) : x);
    vf n = (clamped + 12582912.0f) - 12582912.0f, r = clamped - n;  // adding 1.5 * 2^23 rounds to an integer
#endif
    // a polynomial of 2^r on [-1/2, 1/2], fitted for the least relative error with 1 at 0
    vf p = splat(1.3264714507e-3f);
    p = p * r + 9.6715139225e-3f;
    p = p * r + 5.5507339537e-2f;
    p = p * r + 2.4022242427e-1f;
    p = p * r + 6.9314700365e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 not_small = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(not_small, (__m512)p, (__m512)n);
#else
    vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return x < -126.0f ? splat(0.0f) : p * power;
#endif
}

// How a row is multiplied with a vector of columns, DEPTH elements at a time: as float32, or where the CPU has it, as
// pairs of bf16 that one instruction multiplies and adds up in float32. Left: type of the row; Sum: of what adds up.
struct Floats {
    typedef float Left;
    typedef vf Sum;
    enum { DEPTH = 1 };
    INLINE vf step(vf sum, const float *left, const void *right) { return *left * load((const float *)right) + sum; }
};

#if defined(__AVX512BF16__)
struct Halves {
    typedef uint16_t Left;
    typedef vf Sum;
    enum { DEPTH = 2 };
    INLINE vf step(vf sum, const uint16_t *left, const void *right) {
        int32_t pair;
        memcpy(&pair, left, 4);
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_ps(right));
    }
};
#endif

}  // namespace
