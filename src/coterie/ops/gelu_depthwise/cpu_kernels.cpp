// GELU, scale and shift, identity + 3x3 depthwise convolution, GELU: five passes over memory in torch operators, one here.
//
// x and y are (batch, height, width, channels), packed. A few rows of a block of channels at a time: three rows of u = GELU(x + offset) scale + shift,
// with a column of zeros at either end, turn in a buffer that stays in the second-level cache.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "_gelu.h"

namespace {

using i64 = std::int64_t;
constexpr int W = LANES<float>;
constexpr std::size_t BUFFER = 160 * 1024;  // bytes of the turning rows
constexpr i64 BAND = 16;                    // rows of a piece of work; two more are computed around it

// N outputs side by side share the loads of the weights. rows[k] is the first of their left neighbours in row k.
template <int N>
inline void convolve(const float* const rows[3], const float* weight, i64 cb, i64 ld, const float* bias, float* y, i64 ystride) {
    for (i64 c = 0; c < cb; c += W) {
        vfloat sum[N];
        for (int n = 0; n < N; ++n) sum[n] = at(bias + c);
        for (int k = 0; k < 3; ++k) {
            const vfloat w0 = at(weight + (3 * k) * ld + c), w1 = at(weight + (3 * k + 1) * ld + c), w2 = at(weight + (3 * k + 2) * ld + c);
            vfloat u[N + 2];
            for (int n = 0; n < N + 2; ++n) u[n] = at(rows[k] + n * cb + c);
            for (int n = 0; n < N; ++n) sum[n] += w0 * u[n] + w1 * u[n + 1] + w2 * u[n + 2];
        }
        for (int n = 0; n < N; ++n) at(y + n * ystride + c) = gelu(sum[n]);
    }
}

}  // namespace

// y = GELU(x) scale + shift; rows of C channels, a multiple of 16.
extern "C" void coterie_gelu_affine(const float* x, const float* scale, const float* shift, float* y, i64 rows, i64 C, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < C; c += W) at(y + r * C + c) = gelu(at(x + r * C + c)) * at(scale + c) + at(shift + c);
}

// weight is (9, channels), its centre holding the identity too; channels are a multiple of 16.

extern "C" int coterie_gelu_depthwise(const float* x, const float* offset, const float* scale, const float* shift, const float* weight,
                                      const float* bias, float* y, i64 B, i64 H, i64 L, i64 C, int threads) {
    i64 cb = i64(BUFFER / (3 * sizeof(float) * std::size_t(L + 2))) / W * W;
    cb = std::min(C, std::max<i64>(cb, 2 * W));
    const i64 bands = (H + BAND - 1) / BAND, blocks = (C + cb - 1) / cb;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const i64 row = (L + 2) * cb;
        std::unique_ptr<float[]> memory(new (std::nothrow) float[std::size_t(3 * row + W)]);
        if (!memory) failed = 1;
#pragma omp for schedule(dynamic)
        for (i64 item = 0; item < B * bands * blocks; ++item) {
            if (!memory) continue;
            const i64 b = item / blocks / bands, from = item / blocks % bands * BAND, to = std::min(H, from + BAND), c0 = item % blocks * cb;
            const i64 n = std::min(cb, C - c0);
            float* turning[3];
            for (int k = 0; k < 3; ++k) {
                turning[k] = memory.get() + k * row;
                std::fill(turning[k], turning[k] + n, 0.0f);
                std::fill(turning[k] + (L + 1) * n, turning[k] + (L + 2) * n, 0.0f);
            }
            auto enter = [&](i64 r) {  // row r of u takes its place in the buffer
                float* u = turning[(r + 3) % 3] + n;
                if (r < 0 || r >= H) { std::fill(u, u + L * n, 0.0f); return; }
                const float* in = x + ((b * H + r) * L) * C + c0;
                for (i64 t = 0; t < L; ++t, in += C, u += n)
                    for (i64 c = 0; c < n; c += W) at(u + c) = gelu(at(in + c) + at(offset + c0 + c)) * at(scale + c0 + c) + at(shift + c0 + c);
            };
            enter(from - 1);
            enter(from);
            for (i64 r = from; r < to; ++r) {
                enter(r + 1);
                const float* rows[3] = {turning[(r + 2) % 3], turning[r % 3], turning[(r + 1) % 3]};
                float* out = y + ((b * H + r) * L) * C + c0;
                i64 t = 0;
                for (; t + 4 <= L; t += 4, out += 4 * C) {
                    const float* at_t[3] = {rows[0] + t * n, rows[1] + t * n, rows[2] + t * n};
                    convolve<4>(at_t, weight + c0, n, C, bias + c0, out, C);
                }
                for (; t < L; ++t, out += C) {
                    const float* at_t[3] = {rows[0] + t * n, rows[1] + t * n, rows[2] + t * n};
                    convolve<1>(at_t, weight + c0, n, C, bias + c0, out, C);
                }
            }
        }
    }
    return failed;
}
