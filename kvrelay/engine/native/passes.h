// The passes between GEMMs: rows of embeddings, norms, activations, heads. For isa.cpp only.
#pragma once

#include "vectors.h"

namespace {

template <typename T>
void embed_rows(const int64_t *ids, const T *table, float *out, int64_t width, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const T *from = table + ids[row] * width;
        float *to = out + row * width;
        int64_t i = 0;
        for (; i + W <= width; i += W) store(to + i, load(from + i));
        for (; i < width; i++) to[i] = to_float(from[i]);
    }
}

void embed(const int64_t *ids, const void *table, float *out, int64_t width, int32_t bf16, int64_t first,
           int64_t last) {
    if (bf16)
        embed_rows(ids, (const uint16_t *)table, out, width, first, last);
    else
        embed_rows(ids, (const float *)table, out, width, first, last);
}

// 1 / sqrt(mean of squares + eps)
INLINE float inverse_rms(const float *x, int64_t width, float eps) {
    vf squares = {};
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        vf v = load(x + i);
        squares = v * v + squares;
    }
    float total = sum_of(squares);
    for (; i < width; i++) total += x[i] * x[i];
    return 1.0f / sqrtf(total / (float)width + eps);
}

template <typename T>
void norm_rows(const float *x, const int64_t *rows, const float *weight, float eps, T *out, int64_t width,
               int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *from = x + (rows ? rows[row] : row) * width;
        T *to = out + row * width;
        float factor = inverse_rms(from, width, eps);
        int64_t i = 0;
        for (; i + W <= width; i += W) store(to + i, load(from + i) * factor * load(weight + i));
        for (; i < width; i++) put(to + i, from[i] * factor * weight[i]);
    }
}

void rms_norm(const float *x, const int64_t *rows, const float *weight, float eps, void *out, int64_t width,
              int32_t bf16, int64_t first, int64_t last) {
    if (bf16)
        norm_rows(x, rows, weight, eps, (uint16_t *)out, width, first, last);
    else
        norm_rows(x, rows, weight, eps, (float *)out, width, first, last);
}

template <typename T>
void silu_rows(const T *gate_up, T *out, int64_t ffn, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const T *gate = gate_up + row * 2 * ffn, *up = gate + ffn;
        T *to = out + row * ffn;
        int64_t i = 0;
        for (; i + W <= ffn; i += W) {
            vf g = load(gate + i);
            store(to + i, g / (1.0f + exp2_of(-LOG2_E * g)) * load(up + i));
        }
        for (; i < ffn; i++) {
            float g = to_float(gate[i]);
            put(to + i, g / (1.0f + exp2_of(splat(-LOG2_E * g))[0]) * to_float(up[i]));
        }
    }
}

void silu_mul(const void *gate_up, void *out, int64_t ffn, int32_t bf16, int64_t first, int64_t last) {
    if (bf16)
        silu_rows((const uint16_t *)gate_up, (uint16_t *)out, ffn, first, last);
    else
        silu_rows((const float *)gate_up, (float *)out, ffn, first, last);
}

// Norm (if any) and turn one head x [2 * half] into to.
template <typename T>
void turn(const float *x, const float *norm, float eps, const float *cosine, const float *sine, int64_t half, T *to) {
    float factor = norm ? inverse_rms(x, 2 * half, eps) : 1.0f;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf a = load(x + i) * factor, b = load(x + half + i) * factor, c = load(cosine + i), s = load(sine + i);
        if (norm) {
            a *= load(norm + i);
            b *= load(norm + half + i);
        }
        store(to + i, a * c - b * s);
        store(to + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i] * factor, b = x[half + i] * factor;
        if (norm) {
            a *= norm[i];
            b *= norm[half + i];
        }
        put(to + i, a * cosine[i] - b * sine[i]);
        put(to + half + i, b * cosine[i] + a * sine[i]);
    }
}

template <typename T>
void heads_rows(const KvrHeads *h, int64_t first, int64_t last) {
    const int64_t dim = h->head_dim, half = dim / 2, groups = h->num_kv_heads;
    const int64_t width = (h->num_heads + 2 * groups) * dim;
    for (int64_t row = first; row < last; row++) {
        const float *x = h->qkv + row * width;
        const float *cosine = h->cosine + h->positions[row] * half, *sine = h->sine + h->positions[row] * half;
        T *queries = (T *)h->queries + row * h->num_heads * dim;
        for (int64_t head = 0; head < h->num_heads; head++, x += dim)
            turn(x, h->q_norm, h->eps, cosine, sine, half, queries + head * dim);
        if (h->slots[row] < 0) continue;
        T *keys = (T *)h->keys + h->slots[row] * groups * dim, *values = (T *)h->values + h->slots[row] * groups * dim;
        for (int64_t head = 0; head < groups; head++, x += dim)
            turn(x, h->k_norm, h->eps, cosine, sine, half, keys + head * dim);
        int64_t i = 0;
        for (; i + W <= groups * dim; i += W) store(values + i, load(x + i));
        for (; i < groups * dim; i++) put(values + i, x[i]);
    }
}

void heads(const KvrHeads *h, int64_t first, int64_t last) {
    if (h->bf16)
        heads_rows<uint16_t>(h, first, last);
    else
        heads_rows<float>(h, first, last);
}

// The first column of the highest of x [width] whose bits in words are set; -1 if none is above minus infinity.
int64_t highest_allowed(const float *x, const uint32_t *words, int64_t width) {
    vi lane, bit;
    for (int i = 0; i < W; i++) {
        lane[i] = i;
        bit[i] = 1 << i;
    }
    vf highest = splat(-INFINITY);
    vi column = {};
    const int64_t whole = width / 32 * 32;
    for (int64_t first = 0; first < whole; first += 32) {
        const uint32_t word = words[first / 32];
        if (word == 0) continue;
        for (int part = 0; part < 32; part += W) {
            const vf v = load(x + first + part);
            const vi higher = ((bit & (int32_t)(word >> part)) != 0) & (v > highest);
            highest = higher ? v : highest;
            column = higher ? lane + (int32_t)(first + part) : column;
        }
    }
    float best = -INFINITY;
    int64_t found = -1;
    for (int i = 0; i < W; i++) {
        if (highest[i] > best || (highest[i] == best && column[i] < found)) {
            best = highest[i];
            found = column[i];
        }
    }
    for (int64_t i = whole; i < width; i++) {
        if ((words[i / 32] >> (i % 32) & 1) && x[i] > best) {
            best = x[i];
            found = i;
        }
    }
    return found;
}

}  // namespace
