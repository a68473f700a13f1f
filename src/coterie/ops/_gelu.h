// GELU and its slope for a vector of floats.
#pragma once

#include "_simd.h"

namespace {

// erf(x / sqrt(2)) = z P(z^2) / Q(z^2), z = x / sqrt(2) clamped to [-4, 4]: absolute error below 4e-7.
inline vfloat erf_half(vfloat x) {
    vfloat z = x * 0.70710678118654752f;
    z = z > 4.0f ? vfloat{} + 4.0f : z;
    z = z < -4.0f ? vfloat{} - 4.0f : z;
    const vfloat s = z * z;
    vfloat p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    vfloat q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return z * p / q;
}

// x Phi(x)
inline vfloat gelu(vfloat x) { return 0.5f * x * (1.0f + erf_half(x)); }

// exp(t) for t <= 0, as 2^k 2^f with f in [-1/2, 1/2]: relative error below 2e-7, 0 far out.
inline vfloat exp_negative(vfloat t) {
    t = t * 1.44269504088896341f;
    t = t < -126.0f ? vfloat{} - 126.0f : t;
    const vfloat shifted = t + 12582912.0f;  // 1.5 * 2^23: the sum has no room for a fraction
    const vfloat f = t - (shifted - 12582912.0f);
    vfloat p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    return (vfloat)((vint)p + ((vint)shifted << 23));
}

// GELU'(x) = Phi(x) + x phi(x)
inline vfloat gelu_slope(vfloat x) { return 0.5f * (1.0f + erf_half(x)) + 0.39894228040143268f * x * exp_negative(-0.5f * x * x); }

}  // namespace
