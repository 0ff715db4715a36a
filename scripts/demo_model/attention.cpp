// Causal attention of heads of 32, forward and backward, on one core: tiles of 64 x 64 in cache, float32.
//
// PyTorch's own spends most of a training step on these small heads. Built by attention.py; plain C++ with GCC's vectors.
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int kDim = 32, kTile = 64, kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int Integers __attribute__((vector_size(4 * kLanes)));
using Buffer = std::vector<float>;

Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// e to the x for x <= 0; what is too small to matter comes out as about 1e-38.
Vector exponential(Vector x) {
    x = x < -87.f ? Vector{} - 87.f : x;
    Vector power = x * 1.44269504f;
    Integers whole = __builtin_convertvector(power - 0.5f, Integers);  // rounds to zero, and x <= 0
    Vector y = (power - __builtin_convertvector(whole, Vector)) * 0.693147181f;
    Vector series = 1 + y * (1 + y * (0.5f + y * (0.166666667f + y * (0.0416666667f + y * (0.00833333333f + y * 0.00138888889f)))));
    Integers bits;
    std::memcpy(&bits, &series, sizeof bits);
    bits += whole << 23;
    std::memcpy(&series, &bits, sizeof bits);
    return series;
}

// c[kTile, width] += a[kTile, inner] b[inner, width], where a is stored transposed if kTransposed.
template <int kWidth, int kInner, bool kTransposed>
void multiply(const float* a, const float* b, float* c) {
    constexpr int vectors = kWidth / kLanes, rows = vectors == 2 ? 8 : 4;
    for (int i = 0; i < kTile; i += rows) {
        Vector sum[rows][vectors];
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++) sum[r][n] = load(c + (i + r) * kWidth + n * kLanes);
        for (int k = 0; k < kInner; k++)
            for (int r = 0; r < rows; r++) {
                const float factor = kTransposed ? a[k * kTile + i + r] : a[(i + r) * kInner + k];
                for (int n = 0; n < vectors; n++) sum[r][n] += factor * load(b + k * kWidth + n * kLanes);
            }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++) store(c + (i + r) * kWidth + n * kLanes, sum[r][n]);
    }
}

// [length, kDim] with zeros to a whole number of tiles, times scale.
Buffer padded(const float* x, int length, float scale = 1) {
    Buffer out((length + kTile - 1) / kTile * kTile * kDim);
    for (int i = 0; i < length * kDim; i++) out[i] = x[i] * scale;
    return out;
}

// Each tile [kTile, kDim] turned to [kDim, kTile].
Buffer turned(const Buffer& x) {
    Buffer out(x.size());
    for (size_t tile = 0; tile < x.size(); tile += kTile * kDim)
        for (int i = 0; i < kTile; i++)
            for (int d = 0; d < kDim; d++) out[tile + d * kTile + i] = x[tile + i * kDim + d];
    return out;
}

void hide_future(float* scores) {
    for (int i = 0; i < kTile; i++)
        for (int j = i + 1; j < kTile; j++) scores[i * kTile + j] = -1e30f;
}

}  // namespace

// q, k, v, out [heads, length, 32]; logsumexp [heads, length].
extern "C" void forward(const float* q, const float* k, const float* v, float* out, float* logsumexp, int heads, int length) {
    const float scale = 1 / std::sqrt(float(kDim));
    for (int head = 0; head < heads; head++) {
        const size_t offset = size_t(head) * length * kDim;
        const Buffer queries = padded(q + offset, length, scale), keys = turned(padded(k + offset, length)), values = padded(v + offset, length);
        for (int first = 0; first < length; first += kTile) {
            alignas(64) float mixed[kTile * kDim] = {}, scores[kTile * kTile];
            float most[kTile], sum[kTile] = {};
            for (float& m : most) m = -1e30f;
            for (int other = 0; other <= first; other += kTile) {
                std::memset(scores, 0, sizeof scores);
                multiply<kTile, kDim, false>(&queries[first * kDim], &keys[other * kDim], scores);
                if (other == first) hide_future(scores);
                for (int i = 0; i < kTile; i++) {
                    float* row = scores + i * kTile;
                    float top = most[i];
                    for (int j = 0; j < kTile; j++) top = row[j] > top ? row[j] : top;
                    const float shrink = std::exp(most[i] - top);
                    Vector total = {};
                    for (int j = 0; j < kTile; j += kLanes) {
                        const Vector p = exponential(load(row + j) - top);
                        store(row + j, p);
                        total += p;
                    }
                    float s = 0;
                    for (int lane = 0; lane < kLanes; lane++) s += total[lane];
                    sum[i] = sum[i] * shrink + s;
                    most[i] = top;
                    for (int d = 0; d < kDim; d++) mixed[i * kDim + d] *= shrink;
                }
                multiply<kDim, kTile, false>(scores, &values[other * kDim], mixed);
            }
            for (int i = 0; i < kTile && first + i < length; i++) {
                for (int d = 0; d < kDim; d++) out[offset + (first + i) * kDim + d] = mixed[i * kDim + d] / sum[i];
                logsumexp[size_t(head) * length + first + i] = most[i] + std::log(sum[i]);
            }
        }
    }
}

// The gradients of q, k and v from that of out; everything shaped as in forward.
extern "C" void backward(const float* q, const float* k, const float* v, const float* out, const float* logsumexp, const float* d_out,
                         float* dq, float* dk, float* dv, int heads, int length) {
    const float scale = 1 / std::sqrt(float(kDim));
    const int whole = (length + kTile - 1) / kTile * kTile;
    for (int head = 0; head < heads; head++) {
        const size_t offset = size_t(head) * length * kDim;
        const Buffer queries = padded(q + offset, length, scale), keys = padded(k + offset, length), d_mixed = padded(d_out + offset, length);
        const Buffer keys_turned = turned(keys), values_turned = turned(padded(v + offset, length));
        Buffer d_queries(whole * kDim), offsets(whole), lse(whole);
        for (int i = 0; i < length; i++) {
            for (int d = 0; d < kDim; d++) offsets[i] += d_out[offset + i * kDim + d] * out[offset + i * kDim + d];
            lse[i] = logsumexp[size_t(head) * length + i];
        }
        for (int other = 0; other < length; other += kTile) {
            alignas(64) float d_key[kTile * kDim] = {}, d_value[kTile * kDim] = {}, p[kTile * kTile], dp[kTile * kTile];
            for (int first = other; first < length; first += kTile) {
                std::memset(p, 0, sizeof p);
                std::memset(dp, 0, sizeof dp);
                multiply<kTile, kDim, false>(&queries[first * kDim], &keys_turned[other * kDim], p);
                if (other == first) hide_future(p);
                multiply<kTile, kDim, false>(&d_mixed[first * kDim], &values_turned[other * kDim], dp);
                for (int i = 0; i < kTile; i++)
                    for (int j = i * kTile; j < (i + 1) * kTile; j += kLanes) {
                        Vector score = load(p + j) - lse[first + i];
                        const Vector share = exponential(score > 0.f ? Vector{} : score);
                        store(p + j, share);
                        store(dp + j, share * (load(dp + j) - offsets[first + i]));
                    }
                multiply<kDim, kTile, true>(p, &d_mixed[first * kDim], d_value);
                multiply<kDim, kTile, true>(dp, &queries[first * kDim], d_key);
                multiply<kDim, kTile, false>(dp, &keys[other * kDim], &d_queries[first * kDim]);
            }
            for (int i = 0; i < kTile && other + i < length; i++)
                for (int d = 0; d < kDim; d++) {
                    dk[offset + (other + i) * kDim + d] = d_key[i * kDim + d];
                    dv[offset + (other + i) * kDim + d] = d_value[i * kDim + d];
                }
        }
        for (int i = 0; i < length * kDim; i++) dq[offset + i] = d_queries[i] * scale;
    }
}
