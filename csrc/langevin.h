// The update rules: what one step does to one coordinate. Shared by the SIMD loop and the CUDA kernel, and
// mirrored in plain PyTorch by llc_fast/kernels/reference.py, with which the tests compare them.
#pragma once

#include "philox.h"

namespace llc {

// The hyperparameters of one step, as the caller gives them; a rule reads those it needs. Doubles only, in this
// order: llc_fast/kernels/reference.py's StepScalars is passed as is, and copied to the device for CUDA graphs.
struct Scalars {
    double lr;              // epsilon, the step size
    double nbeta;           // n * beta, the inverse temperature of the mean loss
    double localization;    // gamma, the pull towards the anchor
    double weight_decay;    // mu, the pull towards zero
    double noise_level;     // sigma, 1 for the posterior
    double bounding_box;    // |w - anchor| <= b; infinity: no box
    double decay;           // of the running mean of squared gradients (RMSprop's alpha, Adam's second beta)
    double momentum_decay;  // of the running mean of gradients (Adam's first beta)
    double eps;             // added to the root of the squared gradients
    double friction;        // SGHMC's alpha; SGNHT's diffusion factor A
    double adapt_steps;     // steps whose gradients enter the running mean of squares; later ones leave it as it is
};

// What a step sums up on the way when asked to.
enum Metric : int {
    kGradSquare,      // sum of g^2
    kDistanceSquare,  // sum of (w - w*)^2, before the update
    kWeightSquare,    // sum of w^2, after it
    kNoiseSquare,     // sum of xi^2
    kDriftSquare,     // sum of p drift^2, p the preconditioner
    kDriftNoise,      // sum of sqrt(p) drift xi; with the previous two: MALA's forward and backward densities
    kMomentumSquare,  // sum of squared momenta, after the update
    kHeat,            // sum of g q, q what the rule says of itself: times nbeta it is what a step adds to nbeta L
    kNumMetrics
};

inline namespace LLC_ISA {

// What a rule sees of one coordinate: it reads all of the first part and writes all of the second.
template <class T>
struct Coordinate {
    T grad;            // of the mean minibatch loss
    T anchor;          // w*
    T noise;           // standard normal
    T preconditioner;  // given from outside; 1 if none is
    T thermostat;      // of the chain
    T w;
    T state[2];   // what the rule keeps between steps
    T drift = 0;  // for the metrics
    T scale = 1;  // p, likewise
    T heat = 0;   // q, likewise
};

// nbeta g + gamma (w - w*) + mu w: the gradient of the localized, tempered potential.
template <class T>
struct Potential {
    T nbeta, localization, weight_decay;
    LLC_HD explicit Potential(const Scalars& s)
        : nbeta(T(s.nbeta)), localization(T(s.localization)), weight_decay(T(s.weight_decay)) {}
    LLC_HD T drift(const Coordinate<T>& x, T grad) const {
        return fused(nbeta, grad, fused(localization, x.w - x.anchor, weight_decay * x.w));
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

// The box. Comparisons, not min and max: a NaN must stay a NaN, so that somebody notices.
template <class T>
LLC_HD T clamp_to_box(T w, T anchor, T box) {
    const T low = anchor - box, high = anchor + box;
    return w < low ? low : (w > high ? high : w);
}

// First-order Langevin step in the metric 1/p:  w <- w - (lr/2) p drift + sigma sqrt(lr p) noise, then the box.
template <class T>
struct Langevin {
    Potential<T> potential;
    T half_lr, noise_scale, box;
    LLC_HD explicit Langevin(const Scalars& s)
        : potential(s), half_lr(T(0.5 * s.lr)), noise_scale(T(s.noise_level * sqrt(s.lr))), box(T(s.bounding_box)) {}

    LLC_HD void move(Coordinate<T>& x, T grad, T p, T root_p) const {
        x.drift = potential.drift(x, grad);
        x.scale = p;
        x.heat = T(0.25) * half_lr * p * x.drift;
        // The increment first, then one addition: w is rounded once.
        const T increment = fused(-half_lr * p, x.drift, noise_scale * root_p * x.noise);
        x.w = clamp_to_box(x.w + increment, x.anchor, box);
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
    x.w = clamp_to_box(w, x.anchor, box);
    const bool outside = x.w < w || x.w > w;  // clamped; false for a NaN
    x.state[0] = outside ? -momentum : momentum;
}

// ---- the rules; each says how much state it keeps, and whether it is given a preconditioner -------------------

template <class T>
struct SGLD {
    static constexpr int kStates = 0;
    static constexpr bool kPreconditioned = false;
    Langevin<T> langevin;
    LLC_HD SGLD(const Scalars& s, uint64_t) : langevin(s) {}
    LLC_HD void operator()(Coordinate<T>& x) const { langevin.move(x, x.grad, T(1), T(1)); }
};

// A fixed diagonal preconditioner.
template <class T>
struct PreconditionedSGLD {
    static constexpr int kStates = 0;
    static constexpr bool kPreconditioned = true;
    Langevin<T> langevin;
    LLC_HD PreconditionedSGLD(const Scalars& s, uint64_t) : langevin(s) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        langevin.move(x, x.grad, x.preconditioner, root(x.preconditioner));
    }
};

// p = 1 / (sqrt(V) + eps), V the running mean of g^2 (state[0]); Li et al. 2016.
template <class T>
struct RMSpropSGLD {
    static constexpr int kStates = 1;
    static constexpr bool kPreconditioned = false;
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
    Potential<T> potential;
    T half_lr, keep, noise_scale, box, drift_heat, momentum_heat;
    LLC_HD SGHMC(const Scalars& s, uint64_t)
        : potential(s),
          half_lr(T(0.5 * s.lr)),
          keep(T(1.0 - s.friction)),
          noise_scale(T(s.noise_level * sqrt(s.lr * s.friction))),
          box(T(s.bounding_box)),
          drift_heat(T(s.lr / (8.0 * s.friction))),
          momentum_heat(T((1.0 - s.friction) / (2.0 * s.friction))) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        x.drift = potential.drift(x, x.grad);
        x.heat = fused(drift_heat, x.drift, -momentum_heat * x.state[0]);
        move_with_momentum(x, fused(keep, x.state[0], fused(-half_lr, x.drift, noise_scale * x.noise)), box);
    }
};

// v <- v - lr drift - thermostat v + sigma sqrt(2 A lr) noise;  w <- w + v.  Ding et al. 2014 in devinterp's units;
// the caller moves the thermostat by mean(v^2) - lr afterwards.
template <class T>
struct SGNHT {
    static constexpr int kStates = 1;
    static constexpr bool kPreconditioned = false;
    Potential<T> potential;
    T lr, noise_scale, box;
    LLC_HD SGNHT(const Scalars& s, uint64_t)
        : potential(s),
          lr(T(s.lr)),
          noise_scale(T(s.noise_level * sqrt(2.0 * s.friction * s.lr))),
          box(T(s.bounding_box)) {}
    LLC_HD void operator()(Coordinate<T>& x) const {
        x.drift = potential.drift(x, x.grad);
        const T kept = fused(-x.thermostat, x.state[0], x.state[0]);
        move_with_momentum(x, kept + fused(-lr, x.drift, noise_scale * x.noise), box);
    }
};

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
