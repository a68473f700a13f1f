// The forward pass: scores, composition and exponentials of all tiles of a block of queries, then, with the sums known,
// composition of the weights and products with the values.
#pragma once

#include <atomic>

#include "tiles.h"

namespace {

// e = exp(x - running peak), row by row; `peak` and `total` follow, `peaks` remembers what was taken off.
template <class C>
inline void soften(const C* x, C* e, int N, int rows, i64 stride, C* peak, C* total, C* peaks) {
    constexpr int W = LANES<C>;
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n) {
            const C* from = x + t * stride + n * TS;
            C* to = e + t * stride + n * TS;
            const int i = t * N + n;
            vec<C> most = at(from);
            for (int c = W; c < TS; c += W) most = at(from + c) > most ? at(from + c) : most;
            const C high = horizontal_max<C>(most);
            if (high > peak[i]) {
                total[i] *= std::exp(peak[i] - high);  // exp(-inf) = 0 at first
                peak[i] = high;
            }
            const C off = peak[i] == -INF<C> ? C(0) : peak[i];
            vec<C> sum = {};
            for (int c = 0; c < TS; c += W) {
                const vec<C> y = exponential(at(from + c) - off);
                at(to + c) = y;
                sum += y;
            }
            total[i] += horizontal_sum<C>(sum);
            peaks[i] = peak[i];
        }
}

// weight = e·exp(what was taken off - peak) / total, with `total` inverted before
template <class C>
inline void normalise(const C* e, C* weight, int N, int rows, i64 stride, const C* peak, const C* total, const C* peaks) {
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n) {
            const int i = t * N + n;
            const C factor = peaks[i] == peak[i] ? total[i] : total[i] * std::exp(peaks[i] - peak[i]);
            for (int c = n * TS; c < (n + 1) * TS; c += LANES<C>) at(weight + t * stride + c) = at(e + t * stride + c) * factor;
        }
}

template <class T, class C>
int forward(const T* q, const T* k, const T* v, const Sides<C>& pre, const Sides<C>& post, const Mask& mask, T* out, C* lse, const Shape& s,
            const i64* qs, const i64* ks, const i64* vs, double scale, int threads) {
    constexpr int W = LANES<C>;
    const int N = int(s.H), group = int(s.H / s.HK), R = s.rows, vp = panels<C>(s.dv);
    const i64 stride = i64(N) * TS + 2 * W, tile = R * stride, J = s.tiles();
    const i64 ksize = i64(TS) * s.d, vsize = i64(TS) * vp;
    // Keys and values are packed once, or, where one block is all that reads them, tile by tile just before.
    const bool ahead = s.blocks() > 1;
    const std::size_t all = ahead ? std::size_t(s.B * J * s.HK) : 0;
    Lent<1> packed(bytes_of<C>({all * ksize, all * vsize}));
    C *kt = packed.take<C>(all * ksize), *vr = packed.take<C>(all * vsize);
    const auto pack_key = [&](const T* x, i64 st, int n, C* o) { pack_transposed(x, st, n, s.d, o); };
    const auto pack_value = [&](const T* x, i64 st, int n, C* o) { pack_panels(x, st, n, TS, s.dv, C(1), o); };
    if (ahead) {
        pack_all(s, k, ks, kt, ksize, threads, pack_key);
        pack_all(s, v, vs, vr, vsize, threads, pack_value);
    }

    i64 longest = 0;  // tiles that a block may touch
    for (i64 i = 0; i < s.blocks(); ++i) {
        const i64 t0 = i * R, t1 = std::min(s.Lq, t0 + R);
        longest = std::max(longest, (s.high(t1 - 1) + TS - 1) / TS - s.low(t0) / TS);
    }
    std::atomic<i64> next(0);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        try {
            Lent<0> w(bytes_of<C>({std::size_t(longest * tile), std::size_t(longest) * R * N, std::size_t(tile), std::size_t(tile), std::size_t(R) * N * s.d,
                                   std::size_t(R) * N * vp, std::size_t(R) * TS, std::size_t(R) * N, std::size_t(R) * N,
                                   ahead ? 0 : std::size_t(s.HK) * std::max(ksize, vsize), std::size_t(longest)}));
            C* scratch = w.take<C>(std::size_t(longest * tile));
            C* peaks = w.take<C>(std::size_t(longest) * R * N);
            C* x = w.take<C>(std::size_t(tile));
            C* z = w.take<C>(std::size_t(tile));
            C* qr = w.take<C>(std::size_t(R) * N * s.d);
            C* y = w.take<C>(std::size_t(R) * N * vp);
            C* bias = w.take<C>(std::size_t(R) * TS);
            C* peak = w.take<C>(std::size_t(R) * N);
            C* total = w.take<C>(std::size_t(R) * N);
            C* one = w.take<C>(ahead ? 0 : std::size_t(s.HK) * std::max(ksize, vsize));
            std::uint8_t* seen = w.take<std::uint8_t>(std::size_t(longest));
            for (i64 item; (item = next.fetch_add(1)) < s.B * s.blocks();) {
                const i64 b = item % s.B, t0 = (s.blocks() - 1 - item / s.B) * R;  // the longest first
                const int m = int(std::min<i64>(R, s.Lq - t0));
                const i64 j0 = s.low(t0) / TS, j1 = (s.high(t0 + m - 1) + TS - 1) / TS;
                for (int n = 0; n < N; ++n)
                    pack_rows(q + b * qs[0] + n * qs[1] + t0 * qs[2], qs[2], m, s.d, C(scale), qr + i64(n) * R * s.d, s.d);
                std::fill(peak, peak + i64(m) * N, -INF<C>);
                std::fill(total, total + i64(m) * N, C(0));
                std::fill(y, y + i64(R) * N * vp, C(0));
                for (i64 j = j0; j < j1; ++j) {
                    const Cover c = cover(s, mask, b, t0, m, j, bias);
                    seen[j - j0] = c != NONE;
                    if (c == NONE) continue;
                    if (!ahead) pack_tile(s, k, ks, b, j, one, ksize, pack_key);
                    score(qr, ahead ? kt + (b * J + j) * s.HK * ksize : one, ksize, x, N, group, m, R, s.d, stride);
                    compose<C>(pre.at_block(s, b, t0, j), false, x, z, nullptr, 0, m, stride);
                    if (c == SOME) apply(bias, z, N, m, stride);
                    soften(z, scratch + (j - j0) * tile, N, m, stride, peak, total, peaks + (j - j0) * R * N);
                }
                for (int i = 0; i < m * N; ++i) {
                    lse[(b * N + i % N) * s.Lq + t0 + i / N] = total[i] == 0 ? -INF<C> : peak[i] + std::log(total[i]);
                    total[i] = total[i] > 0 || total[i] != total[i] ? 1 / total[i] : C(0);
                    if (peak[i] == -INF<C>) peak[i] = 0;
                }
                for (i64 j = j0; j < j1; ++j) {
                    if (!seen[j - j0]) continue;
                    normalise(scratch + (j - j0) * tile, z, N, m, stride, peak, total, peaks + (j - j0) * R * N);
                    compose<C>(post.at_block(s, b, t0, j), false, z, x, nullptr, 0, m, stride);
                    if (!ahead) pack_tile(s, v, vs, b, j, one, vsize, pack_value);
                    const C* values = ahead ? vr + (b * J + j) * s.HK * vsize : one;
                    for (int n = 0; n < N; ++n) {
                        const C* panel = values + n / group * vsize;
                        multiply_panels<C, true>(x + n * TS, stride, 1, panel, vp / (2 * W), y + i64(n) * R * vp, vp, m, TS, panel + vsize,
                                                 vsize * i64(sizeof(C)));
                    }
                }
                for (int n = 0; n < N; ++n)
                    for (int t = 0; t < m; ++t)
                        for (int i = 0; i < s.dv; ++i) store(out + ((b * N + n) * s.Lq + t0 + t) * s.dv + i, y[(i64(n) * R + t) * vp + i]);
            }
        } catch (const std::bad_alloc&) { failed |= 1; }
    }
    return failed ? NO_MEMORY : OK;
}

}  // namespace
