// Per-class terms of the divergences between p = exp(log_p) (student) and t = exp(log_t) (target), in forms whose
// every term is >= 0 and of second order in delta = log p - log t: an error of the normalisers, the same for a whole
// row, then enters squared, and divergences of nearly equal rows keep their relative accuracy. (TV is of first order.)
// Classes of probability 0 on both sides count as 0. |delta| < 1/2 takes a Taylor series (relative error below 5e-8),
// the rest the plain form.
#pragma once
#include "rows.h"

namespace di4c::cpu::DI4C_ISA {

// e^x - 1 - x over x^2, |x| < 1/2.
static inline f32 expm1_tail(f32 x) {
  f32 p = fma(set(1.0f / 40320), x, set(1.0f / 5040));
  p = fma(p, x, set(1.0f / 720));
  p = fma(p, x, set(1.0f / 120));
  p = fma(p, x, set(1.0f / 24));
  p = fma(p, x, set(1.0f / 6));
  return fma(p, x, set(0.5f));
}

// log p - log t, 0 where both probabilities vanish.
static inline f32 log_ratio(f32 t, f32 log_t, f32 p, f32 log_p) {
  return (t == 0.0f) & (p == 0.0f) ? f32{} : log_p - log_t;
}

// KL(t || p) is the sum of t (e^delta - 1 - delta) = p - t - t delta; +inf where p = 0 < t.
static inline f32 kl_term(f32 t, f32 log_t, f32 p, f32 log_p) {
  const f32 delta = log_p - log_t, near = t * (delta * delta) * expm1_tail(delta);
  f32 far = p - t - (t == 0.0f ? f32{} : t * delta);
  far = (log_p == -kInf) & (log_t > -kInf) ? set(kInf) : far;  // also where t is too small for a float
  return abs(delta) < 0.5f ? near : far;
}

struct Terms {
  f32 loss, scalar;  // the class's part of the row's loss and of the row scalar that its gradient needs
};

// With m = (p + t) / 2 and u = |delta|: log(larger / m) = log 2 - log(1 + e^-u), log(smaller / m) = that less u.
struct JsLogs {
  f32 larger, smaller, h;  // h = log p - log m
};

static inline JsLogs js_logs(f32 delta) {
  const f32 q = delta * delta, u = abs(delta);
  f32 near = fma(q, set(2.6351687e-5f), set(-3.4722222e-4f));
  near = fma(near, q, set(5.2083333e-3f));
  near = fma(fma(near, q, set(-0.125f)), q, 0.5f * delta);
  const f32 larger = 0x1.62e43p-1f - log1p_unit(exp_nonpos(-u));
  const f32 smaller = larger - (u > 1e30f ? set(1e30f) : u);  // a product with probability 0 stays 0
  return {larger, smaller, u < 0.5f ? near : (delta < 0.0f ? smaller : larger)};
}

// JS = 1/2 sum [t log(t / m) + p log(p / m)]; scalar sum p log(p / m).
static inline Terms js_terms(f32 t, f32 log_t, f32 p, f32 log_p) {
  const f32 delta = log_ratio(t, log_t, p, log_p);
  const JsLogs logs = js_logs(delta);
  f32 near = fma(delta, set(2.1701389e-5f), set(1.7361111e-4f));
  near = fma(near, delta, set(8.6805556e-4f));
  near = fma(near, delta, set(5.2083333e-3f));
  near = fma(near, delta, set(0.03125f));
  near = fma(near, delta, set(0.125f));
  near = fma(near, delta, set(0.25f)) * (delta * delta) * t;
  const f32 larger = delta < 0.0f ? t : p, smaller = delta < 0.0f ? p : t;
  const f32 far = fma(larger, logs.larger, smaller * logs.smaller);
  return {0.5f * (abs(delta) < 0.5f ? near : far), p * logs.h};
}

static inline f32 sign(f32 x) { return x > 0.0f ? set(1.0f) : (x < 0.0f ? set(-1.0f) : x); }

// TV = 1/2 sum |p - t|; scalar sum p sign(p - t).
static inline Terms tv_terms(f32 t, f32 log_t, f32 p, f32 log_p) {
  const f32 delta = log_ratio(t, log_t, p, log_p);
  const f32 near = t * fma(delta * delta, expm1_tail(delta), delta);
  return {0.5f * abs(abs(delta) < 0.5f ? near : p - t), p * sign(delta)};
}

// sum_d w_d row_d over blocks of kPositions in order; positions of weight 0 are passed over.
static inline float weighted_sum(const float* row, const float* weight, int64_t D) {
  double sum = 0;
  for (int64_t start = 0; start < D; start += kPositions) {
    const int64_t end = start + kPositions < D ? start + kPositions : D;
    double block = 0;
    for (int64_t d = start; d < end; ++d) {
      const double w = weight_at(weight, d);
      if (w != 0) block += w * static_cast<double>(row[d]);
    }
    sum += block;
  }
  return static_cast<float>(sum);
}

}  // namespace di4c::cpu::DI4C_ISA
