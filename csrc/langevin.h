// The update rules: what one step does to one coordinate. Shared by the SIMD loop and the CUDA kernel, and
// mirrored in plain PyTorch by llc_fast/kernels/reference.py, with which the tests compare them.
#pragma once

#include <type_traits>

#include "philox.h"

namespace llc {

// The hyperparameters of one step, as the caller gives them; a rule reads those it needs. Doubles only, in this
// order: llc_fast/kernels/step.py's StepScalars is passed as is, and copied to the device for CUDA graphs.
struct Scalars {
    double lr;              // epsilon, the step size
    double nbeta;           // n * beta, the inverse temperature of the mean loss
    double localization;    // gamma, the pull towards the reference point w*
    double weight_decay;    // mu, the pull towards zero
    double noise_level;     // sigma, 1 for the posterior
    double bounding_box;    // |w - w*| <= b; infinity: no box
    double decay;           // of the running mean of squared gradients (RMSprop's alpha, Adam's second beta)
    double momentum_decay;  // of the running mean of gradients (Adam's first beta)
    double eps;             // added to the root of the squared gradients
    double friction;        // SGHMC's alpha; SGNHT's diffusion factor A
    double adapt_steps;     // steps whose gradients enter the running mean of squares; later ones leave it as it is
    double in_metric;       // not 0: localization is (gamma/2)(w - w*)^T A^-1 (w - w*), in the rule that is given A
};

// What a step can sum up on the way, in the order of the columns it writes, with the names that Python has for them.
#define LLC_SUMS(X)                                                                              \
    X(kGradSquare, "grad")         /* g^2 */                                                     \
    X(kDistanceSquare, "distance") /* (w - w*)^2, before the update; over A where A localizes */ \
    X(kWeightSquare, "weight")     /* w^2, after it */                                           \
    X(kNoiseSquare, "noise")       /* xi^2 */                                                    \
    X(kMomentumSquare, "momentum") /* the square of the first state (a momentum), after it */    \
    X(kBias, "bias")               /* g q, q from the rule: nbeta times it is the bias of nbeta L */

enum Sum : int {
#define LLC_ENUMERATOR(sum, name) sum,
    LLC_SUMS(LLC_ENUMERATOR)
#undef LLC_ENUMERATOR
        kNumSums
};

// A set of them: bit k stands for the sum numbered k.
using SumSet = uint32_t;
constexpr SumSet kAllSums = (SumSet{1} << kNumSums) - 1;
constexpr SumSet only(Sum sum) {
    return SumSet{1} << sum;
}
LLC_HD constexpr bool holds(SumSet set, int sum) {
    return set >> sum & 1;
}

inline namespace LLC_ISA {

// What a rule sees of one coordinate: it reads all of the first part and writes all of the second.
template <class T>
struct Coordinate {
    T grad;            // of the mean minibatch loss
    T reference;       // w*
    T noise;           // standard normal
    T preconditioner;  // given from outside; 1 if none is
    T thermostat;      // of the chain
    T w;
    T state[2];     // what the rule keeps between steps
    T bias = 0;     // q, for the sum of that name
    T measure = 1;  // of distances: 1 / A where the localization is in the metric
};

// nbeta g + gamma (w - w*) + mu w: the gradient of the localized, tempered potential.
template <class T>
struct Potential {
    T nbeta, localization, weight_decay;
    LLC_HD explicit Potential(const Scalars& s)
        : nbeta(T(s.nbeta)), localization(T(s.localization)), weight_decay(T(s.weight_decay)) {}
    LLC_HD T drift(const Coordinate<T>& x, T grad) const { return drift(x, grad, localization); }
    LLC_HD T drift(const Coordinate<T>& x, T grad, T gamma) const {
        return fused(nbeta, grad, fused(gamma, x.w - x.reference, weight_decay * x.w));
    }
};

template <class T>
LLC_HD T root(T x) {
#ifdef __CUDACC__
    return sqrt(x);
#else
    return std::sqrt(x);
#endif
}

// The box. A NaN must stay a NaN, so that somebody notices: which these comparisons do, and the one-instruction min and
// max of x86, which they compile to.
template <class T>
LLC_HD T clamp_to_box(T w, T reference, T box) {
    const T low = reference - box, high = reference + box;
    w = high < w ? high : w;
    return low > w ? low : w;
}

// First-order Langevin step in the metric 1/p:  w <- w - (lr/2) p drift + sigma sqrt(lr p) noise, then the box.
template <class T>
struct Langevin {
    Potential<T> potential;
    T half_lr, noise_scale, box;
    LLC_HD explicit Langevin(const Scalars& s)
        : potential(s), half_lr(T(0.5 * s.lr)), noise_scale(T(s.noise_level * sqrt(s.lr))), box(T(s.bounding_box)) {}

    LLC_HD void move(Coordinate<T>& x, T grad, T p, T root_p) const {
        move(x, grad, p, root_p, potential.localization);
    }
    LLC_HD void move(Coordinate<T>& x, T grad, T p, T root_p, T gamma) const {
        const T drift = potential.drift(x, grad, gamma);
        x.bias = T(0.25) * half_lr * p * drift;
        // The increment first, then one addition: w is rounded once.
        const T increment = fused(-half_lr * p, drift, noise_scale * root_p * x.noise);
        x.w = clamp_to_box(x.w + increment, x.reference, box);
    }
};

// A running mean of squared gradients that stops adapting after `adapt_steps` steps.
template <class T>
struct SquareMean {
    T keep, add, eps;
    LLC_HD SquareMean(const Scalars& s, uint64_t step) : keep(T(s.decay)), add(T(1.0 - s.decay)), eps(T(s.eps)) {
        if (double(step) >= s.adapt_steps) keep = T(1), add = T(0);
    }
    LLC_HD void update(T& mean, T grad) const { mean = fused(keep, mean, add * grad * grad); }
};

// A second-order step: the momentum is in state[0] and turns back where the box ends.
template <class T>
LLC_HD void move_with_momentum(Coordinate<T>& x, T momentum, T box) {
    const T w = x.w + momentum;
    x.w = clamp_to_box(w, x.reference, box);
    const T back = x.w - w;  // by the box; a difference, which keeps the compiler from undoing min and max
    const bool outside = back < T(0) || back > T(0);  // false for a NaN
    x.state[0] = outside ? -momentum : momentum;
}

// ---- the rules; each declares its number of states, whether it takes a preconditioner, and the sums that its sampler
// ---- may need at every step, which get a kernel of their own ---------------------------------------------------

template <class T>
struct SGLD {
    static constexpr int kStates = 0;
    static constexpr bool kPreconditioned = false;
    static constexpr SumSet kUsualSums = only(kDistanceSquare) | only(kBias);
    Langevin<T> langevin;
    LLC_HD SGLD(const Scalars& s, uint64_t) : langevin(s) {}
    LLC_HD void operator()(Coordinate<T>& x) const { langevin.move(x, x.grad, T(1), T(1)); }
};

// A fixed diagonal preconditioner A. Localization in its metric pulls each element by gamma / A: outside the metric.
template <class T>
struct PreconditionedSGLD {
    static constexpr int kStates = 0;
    static constexpr bool kPreconditioned = true;
    static constexpr SumSet kUsualSums = only(kDistanceSquare) | only(kBias);
    Langevin<T> langevin;
    bool in_metric;
    LLC_HD PreconditionedSGLD(const Scalars& s, uint64_t) : langevin(s), in_metric(s.in_metric != 0) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        const T p = x.preconditioner;
        const T gamma = langevin.potential.localization;
        x.measure = in_metric ? T(1) / p : T(1);
        langevin.move(x, x.grad, p, root(p), in_metric ? gamma / p : gamma);
    }
};

// p = 1 / (sqrt(V) + eps), V the running mean of g^2 (state[0]); Li et al. 2016.
template <class T>
struct RMSpropSGLD {
    static constexpr int kStates = 1;
    static constexpr bool kPreconditioned = false;
    static constexpr SumSet kUsualSums = only(kDistanceSquare) | only(kBias) | only(kGradSquare);
    Langevin<T> langevin;
    SquareMean<T> squares;
    LLC_HD RMSpropSGLD(const Scalars& s, uint64_t step) : langevin(s), squares(s, step) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        squares.update(x.state[0], x.grad);
        const T p = T(1) / (root(x.state[0]) + squares.eps);
        langevin.move(x, x.grad, p, root(p));
    }
};

// RMSprop's metric and a running mean of gradients (state[1]) as the drift, both corrected for their start at zero.
template <class T>
struct AdamSGLD {
    static constexpr int kStates = 2;
    static constexpr bool kPreconditioned = false;
    static constexpr SumSet kUsualSums = only(kDistanceSquare) | only(kGradSquare);
    Langevin<T> langevin;
    SquareMean<T> squares;
    T keep, add, mean_correction, square_correction;
    LLC_HD AdamSGLD(const Scalars& s, uint64_t step)
        : langevin(s), squares(s, step), keep(T(s.momentum_decay)), add(T(1.0 - s.momentum_decay)) {
        const double seen = double(step + 1), squares_seen = seen < s.adapt_steps ? seen : s.adapt_steps;
        mean_correction = T(1.0 / (1.0 - pow(s.momentum_decay, seen)));
        square_correction = T(1.0 / (1.0 - pow(s.decay, squares_seen)));
    }
    LLC_HD void operator()(Coordinate<T>& x) const {
        squares.update(x.state[0], x.grad);
        x.state[1] = fused(keep, x.state[1], add * x.grad);
        const T p = T(1) / (root(x.state[0] * square_correction) + squares.eps);
        langevin.move(x, x.state[1] * mean_correction, p, root(p));
    }
};

// v <- (1 - alpha) v - (lr/2) drift + sigma sqrt(lr alpha) noise;  w <- w + v.  Chen et al. 2014, eq. 15, with
// their eta = lr/2, so that alpha = 1 is SGLD.
template <class T>
struct SGHMC {
    static constexpr int kStates = 1;
    static constexpr bool kPreconditioned = false;
    static constexpr SumSet kUsualSums = only(kDistanceSquare) | only(kBias);
    Potential<T> potential;
    T half_lr, keep, noise_scale, box, drift_bias, momentum_bias;
    LLC_HD SGHMC(const Scalars& s, uint64_t)
        : potential(s),
          half_lr(T(0.5 * s.lr)),
          keep(T(1.0 - s.friction)),
          noise_scale(T(s.noise_level * sqrt(s.lr * s.friction))),
          box(T(s.bounding_box)),
          drift_bias(T(s.lr / (8.0 * s.friction))),
          momentum_bias(T((1.0 - s.friction) / (2.0 * s.friction))) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        const T drift = potential.drift(x, x.grad);
        x.bias = fused(drift_bias, drift, -momentum_bias * x.state[0]);
        move_with_momentum(x, fused(keep, x.state[0], fused(-half_lr, drift, noise_scale * x.noise)), box);
    }
};

// v <- v - lr drift - thermostat v + sigma sqrt(2 A lr) noise;  w <- w + v.  Ding et al. 2014 in devinterp's units;
// the caller moves the thermostat by mean(v^2) - lr afterwards.
template <class T>
struct SGNHT {
    static constexpr int kStates = 1;
    static constexpr bool kPreconditioned = false;
    static constexpr SumSet kUsualSums = only(kDistanceSquare) | only(kMomentumSquare);
    Potential<T> potential;
    T lr, noise_scale, box;
    LLC_HD SGNHT(const Scalars& s, uint64_t)
        : potential(s),
          lr(T(s.lr)),
          noise_scale(T(s.noise_level * sqrt(2.0 * s.friction * s.lr))),
          box(T(s.bounding_box)) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        const T drift = potential.drift(x, x.grad);
        const T kept = fused(-x.thermostat, x.state[0], x.state[0]);
        move_with_momentum(x, kept + fused(-lr, drift, noise_scale * x.noise), box);
    }
};

// Passes the terms of the sums in kSums that one coordinate contributes: add(sum, a, b) for the term a * b. `before` is
// w before the update. What a sum adds up, and in which order, does not depend on the other sums in the set.
template <SumSet kSums, class Rule, class T, class Add>
LLC_HD void measure(const Coordinate<T>& x, T before, const Add& add) {
    const T distance = before - x.reference;
    if constexpr (holds(kSums, kGradSquare)) add(kGradSquare, x.grad, x.grad);
    if constexpr (holds(kSums, kDistanceSquare)) add(kDistanceSquare, distance, distance * x.measure);
    if constexpr (holds(kSums, kWeightSquare)) add(kWeightSquare, x.w, x.w);
    if constexpr (holds(kSums, kNoiseSquare)) add(kNoiseSquare, x.noise, x.noise);
    if constexpr (holds(kSums, kMomentumSquare) && Rule::kStates > 0) add(kMomentumSquare, x.state[0], x.state[0]);
    if constexpr (holds(kSums, kBias)) add(kBias, x.grad, x.bias);
}

template <SumSet kSums>
using Sums = std::integral_constant<SumSet, kSums>;

// Calls run(Sums<set>{}) with the smallest set that kernels are compiled for and that holds what is wanted: none, the
// rule's usual sums, or all.
template <class Rule, class Run>
void with_sums(SumSet wanted, const Run& run) {
    if (wanted == 0) return run(Sums<0>{});
    if ((wanted & ~Rule::kUsualSums) == 0) return run(Sums<Rule::kUsualSums>{});
    return run(Sums<kAllSums>{});
}

}  // namespace LLC_ISA

// The rules by name; the order is their number. Everything that dispatches on a rule expands this list.
#define LLC_RULES(X)                             \
    X(SGLD, "sgld")                              \
    X(PreconditionedSGLD, "preconditioned-sgld") \
    X(RMSpropSGLD, "rmsprop-sgld")               \
    X(AdamSGLD, "adam-sgld")                     \
    X(SGHMC, "sghmc")                            \
    X(SGNHT, "sgnht")

enum class Rule : int {
#define LLC_ENUMERATOR(type, name) type,
    LLC_RULES(LLC_ENUMERATOR)
#undef LLC_ENUMERATOR
};

}  // namespace llc
