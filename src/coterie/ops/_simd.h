// Vectors of the width that the processor has, by GCC and Clang vector extensions; included by the C++ kernels.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double vdouble __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef std::int32_t vint __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

template <class C> struct vector_of;
template <> struct vector_of<float> { using type = vfloat; };
template <> struct vector_of<double> { using type = vdouble; };
template <class C> using vec = typename vector_of<C>::type;
template <class C> constexpr int LANES = VECTOR_BYTES / sizeof(C);

template <class C> inline vec<C>& at(C* p) { return *reinterpret_cast<vec<C>*>(p); }
template <class C> inline const vec<C>& at(const C* p) { return *reinterpret_cast<const vec<C>*>(p); }

}  // namespace
