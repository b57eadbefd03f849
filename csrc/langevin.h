// The update rules: what one step does to one coordinate. Shared by the SIMD loop and the CUDA kernel, and
// mirrored in plain PyTorch by llc_fast/reference.py, with which the tests compare them.
#pragma once

#include "philox.h"

namespace llc {

// The hyperparameters of one step, as the caller gives them.
struct Scalars {
    double lr;            // epsilon, the step size
    double nbeta;         // n * beta, the inverse temperature of the mean loss
    double localization;  // gamma, the pull towards the anchor
    double weight_decay;  // mu, the pull towards zero
    double noise_level;   // sigma, 1 for the posterior
    double bounding_box;  // |w - anchor| <= b; infinity: no box
};

inline namespace LLC_ISA {

// What a rule sees of one coordinate. It reads all of it and writes `w` (and, later, its own state).
template <class T>
struct Coordinate {
    T w;
    T grad;    // of the mean minibatch loss
    T anchor;  // w*
    T noise;   // standard normal
};

// drift = nbeta g + gamma (w - w*) + mu w: the gradient of the localized, tempered potential.
template <class T>
LLC_HD T drift(const Coordinate<T>& x, T nbeta, T localization, T weight_decay) {
    return fused(nbeta, x.grad, fused(localization, x.w - x.anchor, weight_decay * x.w));
}

// The box. Comparisons, not min and max: a NaN must stay a NaN, so that somebody notices.
template <class T>
LLC_HD T clamp_to_box(T w, T anchor, T half_width) {
    const T low = anchor - half_width, high = anchor + half_width;
    return w < low ? low : (w > high ? high : w);
}

// Stochastic gradient Langevin dynamics (Welling & Teh 2011), localized as in Lau et al. 2023:
//     w <- w - (lr/2) drift + sigma sqrt(lr) noise
template <class T>
struct SGLD {
    T nbeta, localization, weight_decay, bounding_box, half_lr, noise_scale;

    LLC_HD explicit SGLD(const Scalars& s)
        : nbeta(T(s.nbeta)),
          localization(T(s.localization)),
          weight_decay(T(s.weight_decay)),
          bounding_box(T(s.bounding_box)),
          half_lr(T(0.5 * s.lr)),
          noise_scale(T(s.noise_level * sqrt(s.lr))) {}

    LLC_HD void operator()(Coordinate<T>& x) const {
        // The increment first, then one addition: w is rounded once.
        const T increment = fused(-half_lr, drift(x, nbeta, localization, weight_decay), noise_scale * x.noise);
        x.w = clamp_to_box(x.w + increment, x.anchor, bounding_box);
    }
};

}  // namespace LLC_ISA
}  // namespace llc
