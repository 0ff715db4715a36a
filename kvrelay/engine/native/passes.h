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

}  // namespace
