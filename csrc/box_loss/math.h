#pragma once
// L1 and GIoU loss of a predicted box p for a true box t, both (cx, cy, w, h), and their gradients by p.
//
//     l1 = |p - t|_1,   giou = 1 - (I / U - (C - U) / C),   U = A_p + A_t - I
//     d giou = -(1 / U) dI + (I / U^2 - 1 / C) dU + (U / C^2) dC
//
// Where a side of I, C or A_p is clamped to 0 it has no gradient; where two corners tie each has half of it.

#include "../common/boxes.h"

namespace rk::box_loss {

template <typename T>
struct BoxTerms {
  T l1, giou;
  T grad_l1[4], grad_giou[4];
};

// By the two ends of p along one axis: what its own, the overlap's and the hull's side add, each where it is not
// clamped.
template <typename T>
RK_HOST_DEVICE void side_gradient(
    T low, T high, T true_low, T true_high, T by_inner, T by_own, T by_hull, T& grad_low, T& grad_high) {
  const T half = T(0.5), low_is_inner = low > true_low ? T(1) : low == true_low ? half : T(0);
  const T high_is_inner = high < true_high ? T(1) : high == true_high ? half : T(0);
  grad_low = -(by_inner * low_is_inner + by_hull * (T(1) - low_is_inner) + by_own);
  grad_high = by_inner * high_is_inner + by_hull * (T(1) - high_is_inner) + by_own;
}

template <typename T>
RK_HOST_DEVICE BoxTerms<T> box_terms(const T* p, const T* t) {
  BoxTerms<T> terms;
  terms.l1 = T(0);
  for (int i = 0; i < 4; ++i) {
    const T difference = p[i] - t[i];
    terms.l1 += difference < T(0) ? -difference : difference;
    terms.grad_l1[i] = difference > T(0) ? T(1) : difference < T(0) ? T(-1) : T(0);
  }
  const Corners<T> a = corners_of<T>(p[0], p[1], p[2], p[3]), b = corners_of<T>(t[0], t[1], t[2], t[3]);
  const T width = a.x1 - a.x0, height = a.y1 - a.y0, zero = T(0), tiny = SMALLEST_NORMAL<T>;
  const Overlap<T> o = overlap_of(a, area_of(a), b, area_of(b));
  terms.giou = T(1) - generalized_iou<T>(o);
  const T both = at_least(o.both, tiny), hull = at_least(o.hull, tiny);
  const T by_both = (o.both < tiny ? zero : o.inner / both / both) - T(1) / hull;
  const T by_inner = -T(1) / both - by_both;
  const T by_hull = T(1) / hull - (o.hull < tiny ? zero : (o.hull - o.both) / hull / hull);
  const auto kept = [=](T side, T factor) { return side < zero ? zero : factor; };
  const auto length = [=](T side) { return at_least(side, zero); };
  T x0, x1, y0, y1;
  side_gradient(
      a.x0, a.x1, b.x0, b.x1, kept(o.width, by_inner * length(o.height)), kept(width, by_both * length(height)),
      kept(o.hull_width, by_hull * length(o.hull_height)), x0, x1);
  side_gradient(
      a.y0, a.y1, b.y0, b.y1, kept(o.height, by_inner * length(o.width)), kept(height, by_both * length(width)),
      kept(o.hull_height, by_hull * length(o.hull_width)), y0, y1);
  terms.grad_giou[0] = x0 + x1, terms.grad_giou[1] = y0 + y1;
  terms.grad_giou[2] = (x1 - x0) * T(0.5), terms.grad_giou[3] = (y1 - y0) * T(0.5);
  return terms;
}

}  // namespace rk::box_loss
