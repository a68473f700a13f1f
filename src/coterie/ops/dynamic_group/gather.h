// Rows of tokens brought together: by index, as they lie or transposed. And the codes that the kernels return.
#pragma once

#include "_matrix.h"

namespace {

constexpr int OK = 0, BAD_ASSIGNMENT = 1, BAD_SELECTED = 2, NO_MEMORY = 3;

// Rows lie far apart (other heads, q, k and v stand between them), which the hardware does not foresee: ask for a row well before it is read.
constexpr int AHEAD = 12;
template <class T>
inline void prefetch(const T* row, int d) {
    for (int i = 0; i < d; i += int(64 / sizeof(T))) __builtin_prefetch(row + i);
}

// Rows x[index[r]] as the columns of out (d, ld), those beyond n zero; index == nullptr takes rows 0, 1, 2, ... Eight rows at a time, so
// that stores are contiguous.
template <class T, class C>
inline void gather_transposed(const T* x, i64 stride, const std::int32_t* index, int n, int d, C* out, int ld) {
    int r = 0;
    for (; r + 8 <= n; r += 8) {
        const T* row[8];
        for (int l = 0; l < 8; ++l) {
            row[l] = x + (index ? index[r + l] : r + l) * stride;
            if (r + l + AHEAD < n) prefetch(x + (index ? index[r + l + AHEAD] : r + l + AHEAD) * stride, d);
        }
        for (int i = 0; i < d; ++i) {
            C* to = out + i64(i) * ld + r;
            for (int l = 0; l < 8; ++l) to[l] = C(load(row[l][i]));
        }
    }
    for (; r < ld; ++r) {
        const T* row = r < n ? x + (index ? index[r] : r) * stride : nullptr;
        for (int i = 0; i < d; ++i) out[i64(i) * ld + r] = row ? C(load(row[i])) : C(0);
    }
}

// Rows x[index[r]] as packed rows of `ld`, times a factor; index == nullptr takes rows 0, 1, 2, ...
template <class T, class C>
inline void gather(const T* x, i64 stride, const std::int32_t* index, int n, int d, C factor, C* out, int ld) {
    for (int r = 0; r < n; ++r) {
        const T* row = x + (index ? index[r] : r) * stride;
        if (r + AHEAD < n) prefetch(x + (index ? index[r + AHEAD] : r + AHEAD) * stride, d);
        C* to = out + i64(r) * ld;
        for (int i = 0; i < d; ++i) to[i] = C(load(row[i])) * factor;
        for (int i = d; i < ld; ++i) to[i] = 0;
    }
}

}  // namespace
