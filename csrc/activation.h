// gate = act(gate) * up, elementwise. Included per ISA inside its namespace, after simd_<isa>.h,
// hence no #pragma once. NaN goes through.

// e^x for -87.33 <= x <= 88.37 (clamped), relative error below 2e-7: x = n ln 2 + r,
// |r| <= ln 2 / 2, a degree-6 polynomial for e^r (Cephes expf), n added to the exponent.
inline V exp(V x) {
  x = vmin(splat(88.37f), vmax(splat(-87.33f), x));
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = fma(x, splat(1.44269504f), magic);
  const V n = shifted - magic;
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return (V)((VI)p + (((VI)shifted - (VI)magic) << 23));
}

inline V sigmoid(V x) {
  return splat(1.0f) / (splat(1.0f) + exp(-x));
}

inline void activate(Activation kind, float alpha, float limit, float* gate, const float* up,
                     int64_t n) {
  const auto map = [&](auto f) {
    for (int64_t i = 0; i < n; i += VL) store(gate + i, f(load(gate + i), load(up + i)));
  };
  switch (kind) {
    case Activation::silu:
      return map([&](V g, V u) { return g * sigmoid(g) * u; });
    case Activation::relu:
      return map([&](V g, V u) { return vmax(V{}, g) * u; });
    case Activation::gelu_tanh:  // (1 + tanh z) / 2 = sigmoid(2 z)
      return map([&](V g, V u) {
        const V z = splat(0.7978845608f) * fma(splat(0.044715f) * g * g, g, g);
        return g * sigmoid(z + z) * u;
      });
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i)
        gate[i] *= 0.5f * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
      return;
    case Activation::swiglu_clamp:
      return map([&](V g, V u) {
        g = vmin(splat(limit), g);
        u = vmin(splat(limit), vmax(splat(-limit), u));
        return (u + splat(1.0f)) * g * sigmoid(splat(alpha) * g);
      });
  }
}
