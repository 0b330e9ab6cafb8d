// Logistic logits: the S logits of a row computed from two floats, mean mu and log-scale, and never kept.
//
// A logistic distribution cut into S bins of [-1, 1], in the published form with its floor eps. With kappa =
// exp(2 - log_scale), k = kappa / S, and bin i between the scaled edges l_i and r_i = l_i + 2k:
//   x_i = log sigma(r_i) + log(sigma(-l_i) q + eps) = log((1 + eps) sigma(r_i) - sigma(l_i)),   q = 1 - e^(-2k)
//   dx_i/dmu = -kappa (A + B),   dx_i/dlog_scale = -(A r_i + B l_i + C 2k e^(-2k))
//   A = sigma(-r_i),  B = -q sigma(l_i) sigma(-l_i) / (sigma(-l_i) q + eps),  C = sigma(-l_i) / (sigma(-l_i) q + eps)
// In the first form nothing cancels. One exponential e = exp(-|r|) serves a class: sigma(-l) = a / (a + b) with
// (a, b) = (1, e c) left of the mean and (e, c) right of it, c = e^(-2k). Where bins are wide, that would lose digits
// of l, and l takes an exponential of its own. Then
//   x = min(r, 0) + log(N / ((a + b) (1 + e))),  N = a q + eps (a + b):  one logarithm, one quotient.
// Error: a few ulp of max(1, |x|). All operations are IEEE single precision, so CPU and GPU agree bit for bit; cpu/
// logistic.h is the same lane by lane. A NaN in either number makes every logit NaN.
#pragma once
#include "di4c/log.h"

namespace di4c {

constexpr float kLogisticFloor = 1e-6f;       // eps
constexpr float kMinLogScale = -64.0f;        // counts for all below, where kappa would overflow and rows are one-hot
constexpr float kSquareOfE = 0x1.d8e64cp+2f;  // e^2
constexpr float kWideBin = 2.0f;

struct LogisticRow {
  float k, kappa;
  float centre, rest;   // mu S in two parts: the first rounded to a float, the second what that lost, times k
  float q, c;           // 1 - e^(-2k), e^(-2k)
  float dq;             // 2k e^(-2k)
  float log_scale_sign;  // -1, or 0 where the log-scale was bounded and has no gradient
  int32_t S;
  bool wide;  // 2k > kWideBin
};

struct LogisticSlope {  // dx/dmu, dx/dlog_scale
  float mean, log_scale;
};

// A product that no compiler makes part of an fma.
DI4C_FN float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// 1 - e^(-z), z >= 0, without cancellation; c is e^(-z).
DI4C_FN float one_minus_exp(float z, float c) {
  if (!(z < 0.5f)) return 1.0f - c;
  float p = fmaf(1.0f / 40320, z, -1.0f / 5040);
  p = fmaf(p, z, 1.0f / 720);
  p = fmaf(p, z, -1.0f / 120);
  p = fmaf(p, z, 1.0f / 24);
  p = fmaf(p, z, -1.0f / 6);
  p = fmaf(p, z, 0.5f);
  return fmaf(-product(z, z), p, z);
}

DI4C_FN LogisticRow logistic_row(float mean, float log_scale, int64_t S) {
  LogisticRow row;
  const float states = static_cast<float>(S), s = log_scale < kMinLogScale ? kMinLogScale : log_scale;
  row.kappa = s < 0.0f ? kSquareOfE / exp_nonpos(s) : product(kSquareOfE, exp_nonpos(-s));
  row.k = row.kappa / states;
  row.centre = product(mean, states);
  row.rest = product(fmaf(mean, states, -row.centre), row.k);
  const float z = 2.0f * row.k;
  row.c = exp_nonpos(-z);
  row.q = one_minus_exp(z, row.c);
  row.dq = product(z, row.c);
  row.log_scale_sign = log_scale < kMinLogScale ? 0.0f : -1.0f;
  row.S = static_cast<int32_t>(S);
  row.wide = z > kWideBin;
  return row;
}

// The scaled edges of a bin and what is made of them; a and b as above.
struct LogisticBin {
  float r, l, e, a, b;
};

// (2 i - S - mu S) k: the integer less the centre is exact where the two are near, so nothing of it is lost.
DI4C_FN float logistic_edge(const LogisticRow& row, int64_t i) {
  return fmaf(static_cast<float>(2 * i - row.S) - row.centre, row.k, -row.rest);
}

DI4C_FN LogisticBin logistic_bin(const LogisticRow& row, int64_t i) {
  LogisticBin bin;
  bin.r = logistic_edge(row, i + 1);
  bin.e = exp_nonpos(-fabsf(bin.r));
  if (row.wide) {
    bin.l = logistic_edge(row, i);
    const float f = exp_nonpos(-fabsf(bin.l));
    bin.a = bin.l <= 0.0f ? 1.0f : f;
    bin.b = bin.l <= 0.0f ? f : 1.0f;
  } else {
    bin.l = fmaf(-2.0f, row.k, bin.r);
    bin.a = bin.r <= 0.0f ? 1.0f : bin.e;
    bin.b = bin.r <= 0.0f ? product(bin.e, row.c) : row.c;
  }
  return bin;
}

// x_i, 0 <= i < S.
DI4C_FN float logistic_logit(const LogisticRow& row, int64_t i) {
  const LogisticBin v = logistic_bin(row, i);
  const float sum = v.a + v.b, n = fmaf(v.a, row.q, product(kLogisticFloor, sum));
  return (v.r < 0.0f ? v.r : 0.0f) + log_normal(n / product(sum, 1.0f + v.e));
}

// The slopes of x_i: a row's gradient is the sum over i of (gradient of x_i) times them.
DI4C_FN LogisticSlope logistic_slope(const LogisticRow& row, int64_t i) {
  const LogisticBin v = logistic_bin(row, i);
  const float sum = v.a + v.b, n = fmaf(v.a, row.q, product(kLogisticFloor, sum));
  const float tail = 1.0f + v.e, inverse = 1.0f / product(product(n, sum), tail);
  const float share = product(v.a, product(tail, inverse));
  const float A = product(v.r <= 0.0f ? 1.0f : v.e, product(product(n, sum), inverse));
  const float B = -product(product(row.q, v.b), share), C = product(sum, share);
  const float about_scale = fmaf(A, v.r, fmaf(B, v.l, product(C, row.dq)));
  return {-product(row.kappa, A + B), product(row.log_scale_sign, about_scale)};
}

}  // namespace di4c
