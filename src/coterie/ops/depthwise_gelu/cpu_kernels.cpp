// GELU(3x3 depthwise convolution + bias) and its gradient, each in one pass over memory.
//
// x, y, grad and dx are (batch, height, width, channels), packed; weight is (9, channels); channels are a multiple of 16. A block of
// channels at a time, so narrow that three rows of it stay in the second-level cache.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "_gelu.h"

namespace {

using i64 = std::int64_t;
constexpr int W = LANES<float>;
constexpr std::size_t BUFFER = 160 * 1024;  // bytes of three rows
constexpr i64 BAND = 16;                    // rows of a piece of work

// The 3 x 3 sums for N outputs side by side, which share the loads. rows[k] points at the first output's own place in row k (null:
// beyond the border), neighbours are `step` floats apart, and beyond the border of a row (not left, not right) there are zeros.
template <int N>
inline void sums_of(const float* const rows[3], i64 step, bool left, bool right, const float* weight, i64 ld, i64 c, vfloat* sum) {
    for (int k = 0; k < 3; ++k) {
        if (!rows[k]) continue;
        const vfloat w0 = at(weight + (3 * k) * ld + c), w1 = at(weight + (3 * k + 1) * ld + c), w2 = at(weight + (3 * k + 2) * ld + c);
        vfloat u[N + 2];
        u[0] = left ? at(rows[k] - step + c) : vfloat{};
        for (int n = 0; n < N; ++n) u[n + 1] = at(rows[k] + n * step + c);
        u[N + 1] = right ? at(rows[k] + N * step + c) : vfloat{};
        for (int n = 0; n < N; ++n) sum[n] += w0 * u[n] + w1 * u[n + 1] + w2 * u[n + 2];
    }
}

template <int N>
inline void convolve(const float* const rows[3], i64 step, bool left, bool right, const float* weight, i64 ld, const float* bias, i64 n, float* y) {
    for (i64 c = 0; c < n; c += W) {
        vfloat sum[N];
        for (int i = 0; i < N; ++i) sum[i] = at(bias + c);
        sums_of<N>(rows, step, left, right, weight, ld, c, sum);
        for (int i = 0; i < N; ++i) at(y + i * step + c) = gelu(sum[i]);
    }
}

// slopes = grad GELU'(what GELU got), which is computed again: cheaper than reading it.
template <int N>
inline void slope(const float* const rows[3], i64 step, bool left, bool right, const float* weight, i64 ld, const float* bias, i64 n,
                  const float* grad, float* slopes) {
    for (i64 c = 0; c < n; c += W) {
        vfloat sum[N];
        for (int i = 0; i < N; ++i) sum[i] = at(bias + c);
        sums_of<N>(rows, step, left, right, weight, ld, c, sum);
        for (int i = 0; i < N; ++i) at(slopes + i * n + c) = at(grad + i * step + c) * gelu_slope(sum[i]);
    }
}

template <int N>
inline void spread(const float* const rows[3], i64 step, bool left, bool right, const float* flipped, i64 ld, i64 n, float* dx, i64 dx_step) {
    for (i64 c = 0; c < n; c += W) {
        vfloat sum[N] = {};
        sums_of<N>(rows, step, left, right, flipped, ld, c, sum);
        for (int i = 0; i < N; ++i) at(dx + i * dx_step + c) = sum[i];
    }
}

i64 block_of(i64 L, i64 C) {
    const i64 fits = i64(BUFFER / (3 * sizeof(float) * std::size_t(L + 2))) / 16 * 16;
    return std::min(C, std::max<i64>(fits, 32));
}

}  // namespace

extern "C" int coterie_depthwise_gelu(const float* x, const float* weight, const float* bias, float* y, i64 B, i64 H, i64 L, i64 C, int threads) {
    const i64 cb = block_of(L, C), bands = (H + BAND - 1) / BAND, blocks = (C + cb - 1) / cb;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 item = 0; item < B * bands * blocks; ++item) {
        const i64 b = item / blocks / bands, from = item / blocks % bands * BAND, to = std::min(H, from + BAND), c0 = item % blocks * cb;
        const i64 n = std::min(cb, C - c0);
        for (i64 r = from; r < to; ++r) {
            for (i64 t = 0; t < L;) {
                const i64 place = ((b * H + r) * L + t) * C + c0;
                const float* rows[3] = {r ? x + place - L * C : nullptr, x + place, r + 1 < H ? x + place + L * C : nullptr};
                if (t + 4 <= L) {
                    convolve<4>(rows, C, t > 0, t + 4 < L, weight + c0, C, bias + c0, n, y + place);
                    t += 4;
                } else {
                    convolve<1>(rows, C, t > 0, t + 1 < L, weight + c0, C, bias + c0, n, y + place);
                    t += 1;
                }
            }
        }
    }
    return 0;
}

// sums is (10, channels) of zeros: the gradients of the nine weights, then of the bias.
extern "C" int coterie_depthwise_gelu_backward(const float* grad, const float* x, const float* weight, const float* bias, float* dx, float* sums, i64 B,
                                               i64 H, i64 L, i64 C, int threads) {
    const i64 cb = block_of(L, C), bands = (H + BAND - 1) / BAND, blocks = (C + cb - 1) / cb;
    std::unique_ptr<float[]> memory(new (std::nothrow) float[std::size_t(9 * C + threads * (3 * L * cb + 10 * C))]);
    if (!memory) return 1;
    float* flipped = memory.get();
    for (int k = 0; k < 9; ++k) std::copy(weight + k * C, weight + (k + 1) * C, flipped + (8 - k) * C);
    float* all_partial = flipped + 9 * C + threads * 3 * L * cb;
    std::fill(all_partial, all_partial + threads * 10 * C, 0.0f);
    // Each of the `threads` shares is fixed beforehand, so that the sums do not depend on who is quicker.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int share = 0; share < threads; ++share) {
        float* slopes = flipped + 9 * C + share * 3 * L * cb;  // three rows of grad GELU'(.), in turn
        float* partial = all_partial + share * 10 * C;
        const i64 items = B * bands * blocks;
        for (i64 item = items * share / threads; item < items * (share + 1) / threads; ++item) {
            const i64 b = item / blocks / bands, from = item / blocks % bands * BAND, to = std::min(H, from + BAND), c0 = item % blocks * cb;
            const i64 n = std::min(cb, C - c0);
            auto row_of = [&](i64 r) -> float* { return r < 0 || r >= H ? nullptr : slopes + (r + 3) % 3 * L * n; };
            auto enter = [&](i64 r) {
                float* d = row_of(r);
                if (!d) return;
                for (i64 t = 0; t < L;) {
                    const i64 place = ((b * H + r) * L + t) * C + c0;
                    const float* rows[3] = {r ? x + place - L * C : nullptr, x + place, r + 1 < H ? x + place + L * C : nullptr};
                    if (t + 4 <= L) {
                        slope<4>(rows, C, t > 0, t + 4 < L, weight + c0, C, bias + c0, n, grad + place, d + t * n);
                        t += 4;
                    } else {
                        slope<1>(rows, C, t > 0, t + 1 < L, weight + c0, C, bias + c0, n, grad + place, d + t * n);
                        t += 1;
                    }
                }
            };
            enter(from - 1);
            enter(from);
            for (i64 r = from; r < to; ++r) {
                enter(r + 1);
                const float* rows[3] = {row_of(r - 1), row_of(r), row_of(r + 1)};
                for (i64 t = 0; t < L;) {
                    const float* at_t[3];
                    for (int k = 0; k < 3; ++k) at_t[k] = rows[k] ? rows[k] + t * n : nullptr;
                    float* out = dx + ((b * H + r) * L + t) * C + c0;
                    if (t + 4 <= L) {
                        spread<4>(at_t, n, t > 0, t + 4 < L, flipped + c0, C, n, out, C);
                        t += 4;
                    } else {
                        spread<1>(at_t, n, t > 0, t + 1 < L, flipped + c0, C, n, out, C);
                        t += 1;
                    }
                }
                const float* d = rows[1];
                for (i64 c = 0; c < n; c += W) {
                    vfloat total = {};
                    for (i64 t = 0; t < L; ++t) total += at(d + t * n + c);
                    at(partial + 9 * C + c0 + c) += total;
                }
                for (int k = 0; k < 3; ++k) {
                    const i64 rr = r + k - 1;
                    if (rr < 0 || rr >= H) continue;
                    const float* in = x + (b * H + rr) * L * C + c0;
                    for (i64 c = 0; c < n; c += W) {
                        vfloat s0 = {}, s1 = {}, s2 = {}, before = {}, here = at(in + c);
                        for (i64 t = 0; t < L; ++t) {
                            const vfloat after = t + 1 < L ? at(in + (t + 1) * C + c) : vfloat{};
                            const vfloat dt = at(d + t * n + c);
                            s0 += dt * before, s1 += dt * here, s2 += dt * after;
                            before = here, here = after;
                        }
                        float* p = partial + 3 * k * C + c0 + c;
                        at(p) += s0, at(p + C) += s1, at(p + 2 * C) += s2;
                    }
                }
            }
        }
    }
    for (int share = 0; share < threads; ++share)
        for (i64 i = 0; i < 10 * C; ++i) sums[i] += all_partial[share * 10 * C + i];
    return 0;
}
