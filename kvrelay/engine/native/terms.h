// What one step of a product adds to its sums, for each way rows and weights are held. For isa.cpp only.
//
// Left: type of an element of a row; Sum: of what adds up. A step takes DEPTH elements of a row and W * 4 bytes of a
// panel for each vector of columns, and adds them in PARTS turns, from the first element to the last. Each turn unpacks
// only the weights it multiplies, so few registers are needed besides the sums. weights: those of one vector; row: the
// elements of one row; add: their products, added to the sums.
#pragma once

#include "vectors.h"

namespace {

// Rows and weights of float32.
struct FloatTerms {
    typedef float Left;
    typedef vf Sum, Weights, Row;
    enum { DEPTH = 1, PARTS = 1 };
    INLINE vf weights(const char *panel, int) { return load((const float *)panel); }
    INLINE vf row(const float *x, int) { return splat(*x); }
    INLINE vf add(vf sum, vf row, vf weights) { return row * weights + sum; }
};

// Rows of float32 with weights of bf16, which are widened here: the upper half of a float32 is the bf16 itself.
struct WidenedTerms {
    typedef float Left;
    typedef vf Sum, Weights, Row;
    enum { DEPTH = 2, PARTS = 2 };
    INLINE vf weights(const char *panel, int part) {
        vu pairs;
        memcpy(&pairs, panel, sizeof pairs);
        return (vf)(part ? pairs & 0xffff0000 : pairs << 16);
    }
    INLINE vf row(const float *x, int part) { return splat(x[part]); }
    INLINE vf add(vf sum, vf row, vf weights) { return row * weights + sum; }
};

#if defined(__AVX512BF16__)
// Rows and weights of bf16.
struct HalfTerms {
    typedef uint16_t Left;
    typedef vf Sum, Weights;
    typedef int32_t Row;
    enum { DEPTH = 2, PARTS = 1 };
    INLINE vf weights(const char *panel, int) { return load((const float *)panel); }
    INLINE int32_t row(const uint16_t *x, int) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return pair;
    }
    INLINE vf add(vf sum, int32_t row, vf weights) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(row), (__m512bh)weights);
    }
};
#endif

// Rows of uint8 (an int8 and 128) with weights of int8. Sums are exact, so their order does not matter. IS_SIGNED: the
// 128 is taken off here, so that what it adds is not in the sums.
struct ByteTerms {
    typedef uint8_t Left;
    typedef vi Sum, Weights, Row;
#if defined(__AVX512VNNI__)
    enum { DEPTH = 4, PARTS = 1, IS_SIGNED = 0 };
#elif defined(__AVX512BW__)
    enum { DEPTH = 4, PARTS = 2, IS_SIGNED = 0 };  // even elements, then odd ones
#elif defined(__AVX2__)
    enum { DEPTH = 4, PARTS = 1, IS_SIGNED = 1 };
#else
    enum { DEPTH = 4, PARTS = 4, IS_SIGNED = 0 };
#endif
    INLINE vi four(const uint8_t *x) {
        int32_t bytes;
        memcpy(&bytes, x, 4);
        return bytes - (vi){};
    }
    INLINE vi weights(const char *panel, int part) {
        const vi all = load_ints((const int32_t *)panel);
#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
        return (vi)_mm512_srai_epi16(part ? (__m512i)all : _mm512_slli_epi16((__m512i)all, 8), 8);
#elif defined(__AVX2__)
        return all;
#else
        return all << (24 - 8 * part) >> 24;
#endif
    }
    INLINE vi row(const uint8_t *x, int part) {
#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
        return (part ? four(x) >> 8 : four(x)) & 0xff00ff;
#elif defined(__AVX2__)
        return IS_SIGNED ? four(x) ^ (int32_t)0x80808080 : four(x);
#else
        return x[part] - (vi){};
#endif
    }
    INLINE vi add(vi sum, vi row, vi weights) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)row, (__m512i)weights);
#elif defined(__AVX512BW__)
        return sum + (vi)_mm512_madd_epi16((__m512i)row, (__m512i)weights);
#elif defined(__AVX2__)
        // the instruction wants one side without signs; two products of at most 127 * 127 fit in its 16 bits
        const __m256i size = _mm256_abs_epi8((__m256i)row), turned = _mm256_sign_epi8((__m256i)weights, (__m256i)row);
        return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1));
#else
        return sum + row * weights;
#endif
    }
};

}  // namespace
