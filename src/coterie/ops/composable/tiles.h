// Blocks of queries and tiles of keys: which pairs may attend, packing, and the products of all heads of a tile.
#pragma once

#include <limits>

#include "compose.h"

namespace {

constexpr int OK = 0, NO_MEMORY = 3;
template <class C>
constexpr C INF = std::numeric_limits<C>::infinity();

// Columns of d numbers, filled up to whole panels.
template <class C>
constexpr int panels(int d) {
    return (d + 2 * LANES<C> - 1) / (2 * LANES<C>) * (2 * LANES<C>);
}

struct Shape {
    i64 B, H, HK, Lq, Lk;
    int d, dv, causal;
    i64 window;          // 0: none
    int rows;            // queries per block
    i64 tiles() const { return (Lk + TS - 1) / TS; }
    i64 blocks() const { return (Lq + rows - 1) / rows; }
    // keys [low, high) of query t, by position alone
    i64 low(i64 t) const { return window ? std::min(Lk, std::max<i64>(0, t + Lk - Lq - window + 1)) : 0; }
    i64 high(i64 t) const {
        const i64 place = t + Lk - Lq, end = causal ? place + 1 : window ? place + window : Lk;
        return std::max<i64>(0, std::min(Lk, end));
    }
};

struct Mask {
    const std::uint8_t* allowed;
    i64 batch, query, key;  // strides
};

// ------------------------------------------------------------------------------------------------ packing
// Rows of x as float, (n, d) with rows of ld, times a factor.
template <class T, class C>
inline void pack_rows(const T* x, i64 stride, int n, int d, C factor, C* out, int ld) {
    for (int r = 0; r < n; ++r) {
        for (int i = 0; i < d; ++i) out[i64(r) * ld + i] = C(load(x[r * stride + i])) * factor;
        for (int i = d; i < ld; ++i) out[i64(r) * ld + i] = 0;
    }
}

// x (n, d) as panels for a product with x: [d / 2W][total][2W], rows beyond n and columns beyond d are zero.
template <class T, class C>
inline void pack_panels(const T* x, i64 stride, int n, int total, int d, C factor, C* out) {
    constexpr int P = 2 * LANES<C>;
    for (int p = 0; p < d; p += P)
        for (int r = 0; r < total; ++r, out += P)
            for (int l = 0; l < P; ++l) out[l] = r < n && p + l < d ? C(load(x[r * stride + p + l])) * factor : C(0);
}

// x (n, d) as panels for a product with its transpose: [TS / 2W][d][2W], columns beyond n are zero.
template <class T, class C>
inline void pack_transposed(const T* x, i64 stride, int n, int d, C* out) {
    constexpr int P = 2 * LANES<C>;
    for (int p = 0; p < TS; p += P, out += i64(d) * P)
        for (int l = 0; l < P; ++l)
            for (int i = 0; i < d; ++i) out[i * P + l] = p + l < n ? C(load(x[(p + l) * stride + i])) : C(0);
}

// Tile j of x (B, HK, Lk, d), all heads: out[head] of `size` numbers each.
template <class T, class C, class F>
void pack_tile(const Shape& s, const T* x, const i64* stride, i64 b, i64 j, C* out, i64 size, F pack) {
    const int n = int(std::min<i64>(TS, s.Lk - j * TS));
    for (i64 h = 0; h < s.HK; ++h) pack(x + b * stride[0] + h * stride[1] + j * TS * stride[2], stride[2], n, out + h * size);
}

// All tiles: out[b][tile][head].
template <class T, class C, class F>
void pack_all(const Shape& s, const T* x, const i64* stride, C* out, i64 size, int threads, F pack) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 item = 0; item < s.B * s.tiles(); ++item)
        pack_tile(s, x, stride, item / s.tiles(), item % s.tiles(), out + item * s.HK * size, size, pack);
}

// ------------------------------------------------------------------------------------------------ tiles
enum Cover { NONE, SOME, ALL };

// What queries [t0, t0 + n) may see of tile j. For SOME, fills bias[n][TS] with 0 or -inf.
template <class C>
Cover cover(const Shape& s, const Mask& mask, i64 b, i64 t0, int n, i64 j, C* bias) {
    const i64 first = j * TS;
    if (!mask.allowed && s.low(t0 + n - 1) <= first && s.high(t0) >= first + TS) return ALL;
    bool any = false;
    for (int t = 0; t < n; ++t) {
        const int low = int(std::min<i64>(TS, std::max<i64>(0, s.low(t0 + t) - first)));
        const int high = int(std::min<i64>(TS, std::max<i64>(0, s.high(t0 + t) - first)));
        C* row = bias + i64(t) * TS;
        std::fill(row, row + TS, -INF<C>);
        const std::uint8_t* m = mask.allowed ? mask.allowed + b * mask.batch + (t0 + t) * mask.query + first * mask.key : nullptr;
        for (int c = low; c < high; ++c)
            if (!m || m[c * mask.key]) {
                row[c] = 0;
                any = true;
            }
    }
    return any ? SOME : NONE;
}

template <class C>
inline void apply(const C* bias, C* x, int N, int rows, i64 stride) {
    constexpr int W = LANES<C>;
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < TS; c += W) {
                const vec<C> b = at(bias + t * TS + c);
                vec<C>& y = at(x + t * stride + n * TS + c);
                y = b < C(0) ? b : y;
            }
}

// Scores of all heads of a tile: x[t][n] = a[n][t] · panels[head], for `m` of R queries.
template <class C>
inline void score(const C* a, const C* panels, i64 size, C* x, int N, int group, int m, int R, int d, i64 stride) {
    for (int n = 0; n < N; ++n) {
        const C* b = panels + n / group * size;
        multiply_panels<C, false>(a + i64(n) * R * d, d, 1, b, TS / (2 * LANES<C>), x + n * TS, stride, m, d, b + size, size * i64(sizeof(C)));
    }
}

template <class C>
struct Sides {  // the maps of pre or post over all tokens
    const C *query, *key, *fixed;
    int query_rank, key_rank;
    Maps<C> at_block(const Shape& s, i64 b, i64 t, i64 tile) const {
        Maps<C> m{nullptr, nullptr, fixed, query_rank, key_rank, int(s.H)};
        if (query) m.query = query + (b * s.Lq + t) * (2 * query_rank + 1) * s.H;
        if (key) m.key = key + (b * s.tiles() + tile) * (2 * key_rank + 1) * s.H * TS;
        return m;
    }
};

}  // namespace
