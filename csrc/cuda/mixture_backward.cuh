// The gradient of all that the mixture's forward gives, one read of the logits and one write.
//
// With p = p_l(s), mass(s) = sum_l p_l(s), t the teacher's and g the target's probabilities, G the upstream gradients:
//   dlogits_ls = p (A_l - rho(s)) - w G_dist / L t(s) + sum_k coefficient_lk 1[s = x_k],
//   A_l = w (G_mt pull^t_l + G_mg pull^g_l + G_dist / L) - sum_k coefficient_lk,
//   rho(s) = w (G_mt t(s) + G_mg g(s)) / mass(s),
//   coefficient_lk = w ((gj_k + gc_k) share_lk - gc_k p_l(x_k) / mass(x_k)), 0 for a token that no component allows.
// The gradient may be written over the logits. What a position's sequences need is therefore gathered before any of its
// rows is written, and of a class all components are read before any is written, by one thread.
#pragma once
#include "mixture_tokens.cuh"
#include "team.cuh"

namespace di4c::cuda {

constexpr int kTokens = 512;                                        // a CTA's table of them
constexpr int kShortTokens = kTokens * kWarp / kMaxThreads;         // and a warp's, where it has a position of its own

// The sequences' tokens at one position, their lse over components, and what they weigh in the gradient.
struct TokenTable {
  int64_t token[kTokens];  // -1: no state
  Norm lse[kTokens];
  float joint[kTokens], own[kTokens];  // w (gj + gc), w gc
  int next[kTokens];       // the next k whose token lies in the same vector, or -1
};

// Of each class of a tile of logistic rows: top, rho, w G_dist / L t. And the sums of each row's gradient by mean and
// log-scale.
struct LogisticTile {
  static constexpr int kClasses = 4;  // to a thread
  float top[kMaxThreads * kClasses], rho[kMaxThreads * kClasses], even[kMaxThreads * kClasses];
  float by_mean[kComponents], by_log_scale[kComponents];
};

template <int kDType>
struct BackwardShared {
  TokenTable table;
  float slope[kComponents];  // sum_k coefficient_lk, then A_l
  float scratch[kWarp];
};

template <>
struct BackwardShared<kLogistic> {
  TokenTable table;
  float slope[kComponents];
  float scratch[kWarp];
  LogisticTile tile;
};

// One position, and one team's part of the shared memory.
template <int kDType>
struct PositionGradient {
  const MixtureBackwardArgs& p;
  const Group& team;
  BackwardShared<kDType>& shared;
  int token0, component0, tokens_kept;  // where the team's tables start; how many tokens one holds
  int64_t b, d;
  Components<kDType> logits;
  TargetComponents<kDType> teacher, target;
  float w, by_teacher, by_target, each;  // w G_mt, w G_mg, w G_dist / L

  __device__ __forceinline__ PositionGradient(const MixtureBackwardArgs& a, const Group& team_,
                                              BackwardShared<kDType>& memory, int64_t b_, int64_t d_)
      : p(a), team(team_), shared(memory), b(b_), d(d_), logits(a.logits, a.lse, a.B, a.L, a.D, a.S, b_, d_),
        teacher(a.teacher, a.lse_teacher, a.B, 1, a.D, a.S, b_, d_),
        target(a.target, a.lse_target, a.B, a.T, a.D, a.S, b_, d_) {
    tokens_kept = blockDim.y > 1 ? kShortTokens : kTokens;
    token0 = threadIdx.y * kShortTokens;
    component0 = threadIdx.y * kShortComponents;
    const bool inside = a.inside != nullptr && a.inside[b] != 0;
    const auto scaled = [&](bool counts, Part part) { return counts ? w * a.grad_parts[part * a.B + b] : 0.0f; };
    w = weight_at(a.weight, b, a.D, d);
    by_teacher = scaled(a.teacher.data != nullptr, kMarginalTeacher);
    by_target = scaled(a.T > 0 && !inside, kMarginalTarget);
    const bool distils = a.teacher.data != nullptr && (inside || a.inside == nullptr);
    each = scaled(distils, kDistillation) / static_cast<float>(a.L);
  }

  __device__ __forceinline__ bool tabled() const { return p.K <= tokens_kept; }

  // Of value n = (b, k); one of -inf has none.
  __device__ __forceinline__ float joint_gradient(int64_t n) const {
    return p.joint[n] == -INFINITY ? 0.0f : p.grad_joint[n];
  }
  __device__ __forceinline__ float own_gradient(int64_t n) const {
    return p.correlation[n] == -INFINITY ? 0.0f : p.grad_correlation[n];
  }

  // coefficient_lk by the token's share of its mass under component l.
  __device__ __forceinline__ float coefficient(int64_t l, int64_t k, float joint, float own, float of_mass) const {
    return joint * p.share[(b * p.L + l) * p.K + k] - own * of_mass;
  }

  // A_l of every component into the team's table, and the table of the tokens; K beyond it in several turns.
  __device__ __forceinline__ void prepare(const Cut<kDType>& cut) const {
    float* slope = shared.slope + component0;
    for (int64_t l = team.rank; l < p.L; l += team.size) {
      slope[l] = 0.0f;
      if constexpr (kDType == kLogistic) {
        shared.tile.by_mean[component0 + l] = shared.tile.by_log_scale[component0 + l] = 0.0f;
      }
    }
    for (int64_t k0 = 0; k0 < p.K; k0 += tokens_kept) {
      const int count = static_cast<int>(p.K - k0 < tokens_kept ? p.K - k0 : tokens_kept);
      team.sync();
      load_tokens(cut, k0, count);
      for (int64_t l = team.rank / kWarp; l < p.L; l += team.size / kWarp) add_coefficients(l, k0, count);
    }
    team.sync();
    for (int64_t l = team.rank; l < p.L; l += team.size) {
      float a = each - slope[l];
      if (by_teacher != 0.0f) a = fmaf(by_teacher, p.pull[logits.index(l)], a);
      const int64_t target_pull = p.teacher.data == nullptr ? 0 : logits.plane;
      if (by_target != 0.0f) a = fmaf(by_target, p.pull[target_pull + logits.index(l)], a);
      slope[l] = a;
    }
    team.sync();
  }

  // kN classes a thread, from class_of(rank) on: their gradient in all rows.
  template <int kN, class ClassOf>
  __device__ __forceinline__ void gradients(int slots, ClassOf class_of) const {
    if (team.rank >= slots) return;
    const int64_t s = class_of(team.rank);
    if (w == 0.0f) {
      const float zero[kN] = {};
      for (int64_t l = 0; l < p.L; ++l) GradRow<kDType>(p.grad, logits.index(l), p.S).store(s, zero);
      return;
    }
    float top[kN] = {}, rho[kN] = {}, even[kN] = {};
    shares(s, top, rho, even);
    bool deep = false;
#pragma unroll
    for (int i = 0; i < kN; ++i) deep = deep || top[i] != 0.0f;
    int first = -1;
    for (int i = tabled() ? token0 + static_cast<int>(p.K) - 1 : -1; i >= token0; --i) {
      const int64_t token = shared.table.token[i];
      first = token >= s && token < s + kN ? i : first;
    }

    constexpr int kAtOnce = 2;  // rows being fetched together: stores hold up later loads
    for (int64_t l0 = 0; l0 < p.L; l0 += kAtOnce) {
      float x[kAtOnce][kN];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (u == 0 || l0 + u < p.L) logits.log_prob(l0 + u, s, x[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t l = l0 + u;
        if (u > 0 && l >= p.L) break;
        const float a = shared.slope[component0 + l];
        float value[kN];
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const float probability = exp_quick(x[u][i]);
          const float of_top = deep ? exp_quick(x[u][i] - top[i]) : probability;
          value[i] = probability * a - of_top * rho[i] - even[i];
        }
        add_tokens(l, s, first, top, x[u], value);
        GradRow<kDType>(p.grad, logits.index(l), p.S).store(s, value);
      }
    }
  }

  // The gradient of logistic rows: classes are taken through all components by threads, rows through all classes of a
  // tile by warps. (What tokens add has been added.) The two floats of a row are written when all rows have been read.
  __device__ __forceinline__ void logistic_gradients() const {
    LogisticTile& tile = shared.tile;
    const int start = threadIdx.y * blockDim.x * LogisticTile::kClasses, most = team.size * LogisticTile::kClasses;
    for (int64_t begin = 0; w != 0.0f && begin < p.S; begin += most) {
      const int n = static_cast<int>(p.S - begin < most ? p.S - begin : most);
      for (int i = team.rank; i < n; i += team.size) {
        float top[1] = {}, rho[1] = {}, even[1] = {};
        shares(begin + i, top, rho, even);
        tile.top[start + i] = top[0];
        tile.rho[start + i] = rho[0];
        tile.even[start + i] = even[0];
      }
      team.sync();
      for (int64_t l = team.rank / kWarp; l < p.L; l += team.size / kWarp) {
        const auto row = logits.row(l);
        const Norm norm = logits.norm(l);
        const float a = shared.slope[component0 + l];
        float by_mean = 0.0f, by_log_scale = 0.0f;
        for (int i = team.rank % kWarp; i < n; i += kWarp) {
          const float log_p = norm.log_prob(row[begin + i]);
          const float value = exp_quick(log_p) * a - exp_quick(log_p - tile.top[start + i]) * tile.rho[start + i] -
                              tile.even[start + i];
          const LogisticSlope slope = logistic_slope(row.numbers, begin + i);
          by_mean = fmaf(value, slope.mean, by_mean);
          by_log_scale = fmaf(value, slope.log_scale, by_log_scale);
        }
        add_slopes(l, by_mean, by_log_scale);
      }
      team.sync();
    }
    for (int64_t l = team.rank; l < p.L; l += team.size) {
      float* to = static_cast<float*>(p.grad) + 2 * logits.index(l);
      to[0] = w == 0.0f ? 0.0f : tile.by_mean[component0 + l];
      to[1] = w == 0.0f ? 0.0f : tile.by_log_scale[component0 + l];
    }
  }

 private:
  __device__ __forceinline__ void load_tokens(const Cut<kDType>& cut, int64_t k0, int count) const {
    TokenTable& table = shared.table;
    for (int k = team.rank; k < count; k += team.size) {
      const int64_t token = token_of(p, b, k0 + k, d), n = b * p.K + k0 + k;
      const float own = own_gradient(n), joint = joint_gradient(n);
      table.token[token0 + k] = is_state(token, p.S) ? token : -1;
      table.joint[token0 + k] = w * (joint + own);
      table.own[token0 + k] = w * own;
    }
    team.sync();
    const int lanes = lanes_for(p.L), lane = team.rank % kWarp % lanes, together = team.size / lanes;
    for (int k = team.rank / lanes; k - k % (kWarp / lanes) < count; k += together) {  // whole warps
      const int64_t token = shared.table.token[token0 + (k < count ? k : 0)];
      const Norm lse = over_components(p.L, lane, lanes, [&](int64_t l) {
        return token < 0 ? NAN : logits.norm(l).log_prob(logits.row(l)[token]);
      });
      if (k < count && lane == 0) table.lse[token0 + k] = lse;
    }
    for (int k = team.rank; k < count; k += team.size) {
      const int64_t mine = cut.start(table.token[token0 + k]);
      int next = -1;
      for (int j = count - 1; j > k; --j) next = cut.start(table.token[token0 + j]) == mine ? token0 + j : next;
      table.next[token0 + k] = next;
    }
    team.sync();
  }

  // Sequences k0 .. k0 + count into component l's sum, by a warp; of a logistic row also what they add to its gradient.
  __device__ __forceinline__ void add_coefficients(int64_t l, int64_t k0, int count) const {
    const TokenTable& table = shared.table;
    const auto row = logits.row(l);
    const Norm norm = logits.norm(l);
    float sum = 0.0f, by_mean = 0.0f, by_log_scale = 0.0f;
    for (int k = team.rank % kWarp; k < count; k += kWarp) {
      const int64_t token = table.token[token0 + k];
      const Norm lse = table.lse[token0 + k];
      if (lse.log_sum == -INFINITY) continue;
      const float of_mass = token < 0 ? NAN : exp_quick(lse.log_prob(norm.log_prob(row[token])));
      const float c = coefficient(l, k0 + k, table.joint[token0 + k], table.own[token0 + k], of_mass);
      sum += c;
      if constexpr (kDType == kLogistic) {
        if (token < 0) continue;
        const LogisticSlope slope = logistic_slope(row.numbers, token);
        by_mean = fmaf(c, slope.mean, by_mean);
        by_log_scale = fmaf(c, slope.log_scale, by_log_scale);
      }
    }
    sum = warp_sum(sum);
    if (team.rank % kWarp == 0) shared.slope[component0 + l] += sum;
    if constexpr (kDType == kLogistic) add_slopes(l, by_mean, by_log_scale);
  }

  __device__ __forceinline__ void add_slopes(int64_t l, float by_mean, float by_log_scale) const {
    by_mean = warp_sum(by_mean);
    by_log_scale = warp_sum(by_log_scale);
    if (team.rank % kWarp != 0) return;
    shared.tile.by_mean[component0 + l] += by_mean;
    shared.tile.by_log_scale[component0 + l] += by_log_scale;
  }

  // Of kN classes: rho as what is to be multiplied by p_l / exp(top), and w G_dist / L t. Where no table tells what
  // share of a token's mass is a component's, top is the logarithm of the mass; +inf where there is none.
  template <int kN>
  __device__ __forceinline__ void shares(int64_t s, float (&top)[kN], float (&rho)[kN], float (&even)[kN]) const {
    float t[kN], log_t[kN];
    if (by_teacher != 0.0f || each != 0.0f) {
      teacher_of(teacher, s, t, log_t);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        rho[i] = by_teacher * t[i];
        even[i] = each * t[i];
      }
    }
    if (by_target != 0.0f) {
      target_of(target, s, t, log_t);
#pragma unroll
      for (int i = 0; i < kN; ++i) rho[i] = fmaf(by_target, t[i], rho[i]);
    }
    const bool no_table = kDType != kLogistic && !tabled();
    if (by_teacher == 0.0f && by_target == 0.0f && !no_table) return;
    Mass<kN> mass;
    logits.mass(s, mass);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      top[i] = mass.top[i];
      if (mass.sum[i] == 0.0f) {
        rho[i] = 0.0f;
        top[i] = INFINITY;
      } else if (no_table) {
        top[i] += logf(mass.sum[i]);
      } else {
        rho[i] /= mass.sum[i];
      }
    }
  }

  // What the sequences add to the classes from s on; `first` is the first in the table whose token is one of them.
  template <int kN>
  __device__ __forceinline__ void add_tokens(int64_t l, int64_t s, int first, const float (&top)[kN],
                                             const float (&log_p)[kN], float (&value)[kN]) const {
    const TokenTable& table = shared.table;
    for (int i = first; i >= 0; i = table.next[i]) {
      const int at = static_cast<int>(table.token[i] - s);
      const Norm lse = table.lse[i];
      if (lse.log_sum == -INFINITY) continue;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (j == at)
          value[j] += coefficient(l, i - token0, table.joint[i], table.own[i], exp_quick(lse.log_prob(log_p[j])));
      }
    }
    if (tabled()) return;
    for (int64_t k = 0; k < p.K; ++k) {  // more than the table holds: looked for one by one
      const int64_t at = token_of(p, b, k, d) - s, n = b * p.K + k;
      if (at < 0 || at >= kN) continue;
      const float joint = w * (joint_gradient(n) + own_gradient(n)), own = w * own_gradient(n);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (j == at && top[j] != INFINITY) value[j] += coefficient(l, k, joint, own, exp_quick(log_p[j] - top[j]));
      }
    }
  }
};

// A team takes a position (`cluster` CTAs where a cluster of them does), CTAs along z its tiles.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_backward_kernel(MixtureBackwardArgs p, int cluster) {
  DI4C_SHARED(BackwardShared<kDType>, shared);
  const Group team(shared.scratch);
  const int64_t first = int64_t{blockIdx.z} * cluster + blockIdx.x % cluster, step = int64_t{gridDim.z} * cluster;
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    for (int64_t d0 = blockIdx.x / cluster * blockDim.y; d0 < p.D; d0 += int64_t{gridDim.x / cluster} * blockDim.y) {
      const int64_t d = d0 + threadIdx.y;
      if (d >= p.D) continue;
      const PositionGradient<kDType> position(p, team, shared, b, d);
      if constexpr (kDType == kLogistic) {
        if (position.w != 0.0f) position.prepare(Cut<kDType>(0, p.S));
        position.logistic_gradients();
      } else {
        const Cut<kDType> cut(GradRow<kDType>(p.grad, position.logits.index(0), p.S).head(p.S), p.S);
        const int64_t tiles = cut.vectors > team.size ? ceil_div(cut.vectors, team.size) : 1;
        if (position.w != 0.0f && first < tiles) position.prepare(cut);
        if (cluster > 1) cluster_sync();  // all have gathered: rows may be written
        for (int64_t tile = first; tile < tiles; tile += step) {
          const int64_t v = tile * team.size, slots = cut.vectors - v;
          position.template gradients<kVector>(static_cast<int>(slots < team.size ? slots : team.size),
                                               [&](int64_t i) { return cut.vector(v + i); });
          if (tile == 0)
            position.template gradients<1>(static_cast<int>(cut.loose), [&](int64_t i) { return cut.single(i); });
        }
      }
      team.sync();  // the tables are written again
    }
  }
}

}  // namespace di4c::cuda
