#pragma once
// Boxes (cx, cy, w, h) and their generalised intersection over union (arXiv 1902.09630). T is a number type, V a T or a
// vector of them. A NaN of the predicted box p stays one.

#include "host_device.h"

namespace rk {

template <typename V>
struct Corners {
  V x0, y0, x1, y1;
};

template <typename T, typename V>
RK_HOST_DEVICE Corners<V> corners_of(V cx, V cy, V w, V h) {
  const V half_w = w * T(0.5), half_h = h * T(0.5);
  return {cx - half_w, cy - half_h, cx + half_w, cy + half_h};
}

template <typename T>
constexpr T SMALLEST_NORMAL = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38f);

// max(x, bound), a NaN for NaN.
template <typename V>
RK_HOST_DEVICE V at_least(V x, V bound) {
  return x < bound ? bound : x;
}

template <typename V>
RK_HOST_DEVICE V at_most(V x, V bound) {
  return x > bound ? bound : x;
}

template <typename V>
RK_HOST_DEVICE V area_of(const Corners<V>& box) {
  return at_least(box.x1 - box.x0, V{}) * at_least(box.y1 - box.y0, V{});
}

// Sides of the overlap and of the hull of two boxes, and the areas of GIoU = I / U - (C - U) / C; 0 / 0 counts as 0.
template <typename V>
struct Overlap {
  V width, height, hull_width, hull_height;  // not clamped to 0
  V inner, both, hull;                       // I, U, C
};

template <typename V>
RK_HOST_DEVICE Overlap<V> overlap_of(const Corners<V>& p, V area_p, const Corners<V>& t, V area_t) {
  Overlap<V> o;
  o.width = at_most(p.x1, t.x1) - at_least(p.x0, t.x0), o.height = at_most(p.y1, t.y1) - at_least(p.y0, t.y0);
  o.hull_width = at_least(p.x1, t.x1) - at_most(p.x0, t.x0), o.hull_height = at_least(p.y1, t.y1) - at_most(p.y0, t.y0);
  o.inner = at_least(o.width, V{}) * at_least(o.height, V{});
  o.hull = at_least(o.hull_width, V{}) * at_least(o.hull_height, V{});
  o.both = area_p + area_t - o.inner;
  return o;
}

template <typename T, typename V>
RK_HOST_DEVICE V generalized_iou(const Overlap<V>& o) {
  const V tiny = V{} + SMALLEST_NORMAL<T>;
  return o.inner / at_least(o.both, tiny) - (o.hull - o.both) / at_least(o.hull, tiny);
}

}  // namespace rk
