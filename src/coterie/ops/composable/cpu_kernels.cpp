// Composable attention on the CPU.
//
// A block of queries goes over its keys tile by tile, all heads together, since every head takes from every other. The
// exponentials of one block's rows wait in a scratch buffer until their sums are known, then they are composed and
// multiplied by the values: each product is computed once, and memory is linear in the keys.
//
// Plain C++17 with GCC/Clang vector extensions and OpenMP, no torch headers, called through ctypes. Arithmetic is float
// (double for double tensors). Sums run in a fixed order: the same bits for any number of threads.

#include "backward.h"
#include "forward.h"

namespace {

template <class F>
int guarded(F f) {
    try {
        return f();
    } catch (const std::bad_alloc&) { return NO_MEMORY; }
}

}  // namespace

// sizes: B, H, HK, Lq, Lk, d, dv, causal, window, rows, ranks of pre (query, key), of post. maps: query, key, fixed of pre, then of post.
// strides: 3 numbers each for query, key, value, mask.
#define EXPORT(SUFFIX, T, C)                                                                                                                  \
    extern "C" int coterie_forward_##SUFFIX(const T* q, const T* k, const T* v, const C* const* maps, const std::uint8_t* mask, T* out,       \
                                            C* lse, const i64* n, const i64* st, double scale, int threads) {                                 \
        const Shape s{n[0], n[1], n[2], n[3], n[4], int(n[5]), int(n[6]), int(n[7]), n[8], int(n[9])};                                        \
        const Sides<C> pre{maps[0], maps[1], maps[2], int(n[10]), int(n[11])}, post{maps[3], maps[4], maps[5], int(n[12]), int(n[13])};       \
        const Mask m{mask, st[9], st[10], st[11]};                                                                                            \
        return guarded([&] { return forward<T, C>(q, k, v, pre, post, m, out, lse, s, st, st + 3, st + 6, scale, threads); });                \
    }                                                                                                                                         \
    extern "C" int coterie_backward_##SUFFIX(const T* g, const T* q, const T* k, const T* v, const C* const* maps, C* const* slopes,          \
                                             const std::uint8_t* mask, const C* lse, T* dq, T* dk, T* dv, const i64* n, const i64* st,        \
                                             double scale, int threads) {                                                                     \
        const Shape s{n[0], n[1], n[2], n[3], n[4], int(n[5]), int(n[6]), int(n[7]), n[8], int(n[9])};                                        \
        const Sides<C> pre{maps[0], maps[1], maps[2], int(n[10]), int(n[11])}, post{maps[3], maps[4], maps[5], int(n[12]), int(n[13])};       \
        const Gradients<C> dpre{slopes[0], slopes[1], slopes[2]}, dpost{slopes[3], slopes[4], slopes[5]};                                     \
        const Mask m{mask, st[9], st[10], st[11]};                                                                                            \
        return guarded([&] {                                                                                                                  \
            return backward<T, C>(g, q, k, v, pre, post, dpre, dpost, m, lse, dq, dk, dv, s, st + 12, st, st + 3, st + 6, scale, threads);    \
        });                                                                                                                                   \
    }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bf16, float)
