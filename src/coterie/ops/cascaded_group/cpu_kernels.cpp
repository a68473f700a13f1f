// Cascaded group attention of EfficientViT on the CPU, inference: one window at a time through all heads, in the first-level caches.
//
// A window of 49 tokens and 64 channels is 12 kB, and a head has a dozen small steps: as operators they are nearly all overhead.
// x is read with any strides; y is (batch, rows, columns, heads * value_dim), packed. Work is cut by window: results are the same
// bits for any number of threads.

#include <limits>
#include <vector>

#include "_matrix.h"

namespace {

constexpr int W = LANES<float>;
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Shape {
    i64 B, H, L;                       // batch, rows, columns
    int heads, kd, d, h, w, side;      // channels of query and key, and of a head, which are those of its value; window; side of the table
    int kernel;                        // of the convolution of the query, odd
};

// q (rows of the window, kd) through the depth-wise convolution, times scale; taps are (kernel * kernel, kd).
void convolve(const Shape& s, const float* q, i64 ldq, const float* taps, const float* bias, float scale, float* out) {
    const int half = s.kernel / 2;
    for (int i = 0; i < s.h; ++i)
        for (int j = 0; j < s.w; ++j)
            for (int c = 0; c < s.kd; c += W) {
                vfloat sum = at(bias + c);
                const int from = std::max(0, j - half), to = std::min(s.w - 1, j + half);
                for (int r = std::max(0, i - half); r <= std::min(s.h - 1, i + half); ++r) {
                    const float* tap = taps + ((r - i + half) * s.kernel + from - j + half) * s.kd + c;
                    const float* in = q + (r * s.w + from) * ldq + c;
                    for (int t = from; t <= to; ++t, tap += s.kd, in += ldq) sum += at(tap) * at(in);
                }
                at(out + (i * s.w + j) * s.kd + c) = sum * scale;
            }
}

// Scores to weights that sum to one; zeros where every score is -inf. n is a multiple of the vector length.
void soften(float* row, int n) {
    vfloat most = at(row);
    for (int j = W; j < n; j += W) most = at(row + j) > most ? at(row + j) : most;
    const float peak = horizontal_max<float>(most);
    if (peak == NONE) { std::fill(row, row + n, 0.0f); return; }
    vfloat sum = {};
    for (int j = 0; j < n; j += W) sum += at(row + j) = exponential(at(row + j) - peak);
    const float inverse = 1.0f / horizontal_sum<float>(sum);
    for (int j = 0; j < n; j += W) at(row + j) *= inverse;
}

}  // namespace

// weight (heads, d, 2 kd + d), its rows as queries, keys, values; bias (heads, 2 kd + d); taps (heads, kernel^2, kd); tap_bias (heads, kd);
// table (heads, side * side), by absolute offset; mask (batch, rows, columns) or null, 1 = a real token. kd and d are multiples of 16.
// outside: whether zeros behind the last row and column take part.
extern "C" int coterie_cascaded_group(const float* x, const float* weight, const float* bias, const float* taps, const float* tap_bias,
                                      const float* table, const std::uint8_t* mask, float* y, const i64* sizes, const i64* strides, float scale,
                                      int outside, int threads) {
    const Shape s{sizes[0], sizes[1], sizes[2], int(sizes[3]), int(sizes[4]), int(sizes[5]), int(sizes[6]), int(sizes[7]), int(sizes[8]), int(sizes[9])};
    const int T = s.h * s.w, Tp = padded<float>(T), N = 2 * s.kd + s.d;
    const i64 down = (s.H + s.h - 1) / s.h, across = (s.L + s.w - 1) / s.w;
    int failed = 0;
    try {
        std::vector<float> offsets(std::size_t(s.heads) * T * Tp, NONE);
        for (int head = 0; head < s.heads; ++head)
            for (int i = 0; i < T; ++i)
                for (int j = 0; j < T; ++j)
                    offsets[std::size_t((head * T + i) * Tp + j)] =
                        table[(head * s.side + std::abs(i / s.w - j / s.w)) * s.side + std::abs(i % s.w - j % s.w)];
#pragma omp parallel num_threads(threads) reduction(| : failed)
        try {
            const std::size_t rows = std::size_t(T);
            Workspace& memory = workspace(bytes_of<float>({rows * s.d, rows * N, rows * s.kd, std::size_t(s.kd) * Tp, rows * Tp, rows * s.d, std::size_t(Tp)}));
            float *f = memory.take<float>(rows * s.d), *qkv = memory.take<float>(rows * N), *q = memory.take<float>(rows * s.kd);
            float *k = memory.take<float>(std::size_t(s.kd) * Tp), *score = memory.take<float>(rows * Tp), *out = memory.take<float>(rows * s.d);
            float* absent = memory.take<float>(Tp);
#pragma omp for schedule(dynamic)
            for (i64 item = 0; item < s.B * down * across; ++item) {
                const i64 b = item / (down * across), top = item / across % down * s.h, left = item % across * s.w;
                bool whole = true;
                for (int t = 0; t < T; ++t) {
                    const i64 r = top + t / s.w, c = left + t % s.w;
                    const bool inside = r < s.H && c < s.L;
                    const bool real = inside ? !mask || mask[(b * s.H + r) * s.L + c] : outside;
                    absent[t] = real ? 0.0f : NONE;
                    whole = whole && real;
                }
                std::fill(absent + T, absent + Tp, NONE);
                for (int head = 0; head < s.heads; ++head) {
                    // this head's channels of the window, plus what the head before made of its own
                    if (head) std::copy(out, out + i64(T) * s.d, f);
                    else std::fill(f, f + i64(T) * s.d, 0.0f);
                    const float* corner = x + b * strides[0] + top * strides[1] + left * strides[2] + head * s.d * strides[3];
                    const int high = int(std::min<i64>(s.h, s.H - top)), wide = int(std::min<i64>(s.w, s.L - left));
                    for (int i = 0; i < high; ++i) {
                        const float* row = corner + i * strides[1];
                        float* to = f + i64(i) * s.w * s.d;
                        if (strides[3] == 1)
                            for (int j = 0; j < wide; ++j)
                                for (int c = 0; c < s.d; c += W) at(to + j * s.d + c) += at(row + j * strides[2] + c);
                        else  // a map: columns lie side by side
                            for (int c = 0; c < s.d; ++c)
                                for (int j = 0; j < wide; ++j) to[j * s.d + c] += row[j * strides[2] + c * strides[3]];
                    }
                    for (int t = 0; t < T; ++t) std::copy(bias + head * N, bias + (head + 1) * N, qkv + t * N);
                    multiply<float, true>(f, s.d, 1, weight + i64(head) * s.d * N, N, qkv, N, T, N, s.d);
                    if (!whole)
                        for (int t = 0; t < T; ++t)
                            if (absent[t]) std::fill(qkv + t * N, qkv + t * N + s.kd, 0.0f);
                    convolve(s, qkv, N, taps + i64(head) * s.kernel * s.kernel * s.kd, tap_bias + head * s.kd, scale, q);
                    for (int i = 0; i < s.kd; ++i) {
                        for (int t = 0; t < T; ++t) k[i * Tp + t] = qkv[t * N + s.kd + i];
                        std::fill(k + i * Tp + T, k + (i + 1) * Tp, 0.0f);
                    }
                    std::copy(&offsets[std::size_t(head) * T * Tp], &offsets[std::size_t(head) * T * Tp] + T * Tp, score);
                    multiply<float, true>(q, s.kd, 1, k, Tp, score, Tp, T, Tp, s.kd);
                    for (int t = 0; t < T; ++t) {
                        float* row = score + t * Tp;
                        if (!whole)
                            for (int j = 0; j < Tp; j += W) at(row + j) += at(absent + j);
                        soften(row, Tp);
                    }
                    multiply<float, false>(score, Tp, 1, qkv + 2 * s.kd, N, out, s.d, T, s.d, T);
                    for (int t = 0; t < T; ++t) {
                        const i64 r = top + t / s.w, c = left + t % s.w;
                        if (r < s.H && c < s.L) std::copy(out + t * s.d, out + (t + 1) * s.d, y + (((b * s.H + r) * s.L + c) * s.heads + head) * s.d);
                    }
                }
            }
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    } catch (const std::bad_alloc&) {
        failed = 1;
    }
    return failed;
}
