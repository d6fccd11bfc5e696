// Lays out the input of a conv whose elements are read by many output channels: as panels of a few vectors of pixels,
// one element of the kernel after the other. In the input itself, channels lie far apart and their pixels map to the
// same cache sets; in planes, there are gaps between rows.
#pragma once
#include "direct/panel_microtile.h"
#include "base/planes.h"

namespace DYCONVERT_TARGET {

template <typename T>
class Panels {
 public:
  // at_once: whether all panels of some images are laid out before they are used; else each is laid out where it is
  // used. column: whether a last pixel that would fill a vector alone is laid out as a column instead.
  Panels(const Shape& s, bool at_once, bool column)
      : shape_(s),
        planes_(s),
        pixels_({s.out_height, s.out_width, s.pixels(), s.out_width, 1}, s.out_width),
        column_(column && s.pixels() > kLanes<T> && s.pixels() % kLanes<T> == 1),
        at_once_(at_once),
        elements_(s.in_channels * s.taps()),
        in_place_(planes_.in_place() && s.pixels() >= kLanes<T>),
        image(at_once     ? elements_ * (vectors() * kLanes<T> + column_)
              : in_place_ ? s.x_image
                          : planes_.image) {
    for (i64 v = 0; v < vectors(); v += panels_.back().vectors) {
      panels_.push_back({v, vectors_together(vectors() - v), 0, i64(copies_.size())});
      add_copies(panels_.back());
    }
    panels_.push_back({vectors(), 0, 0, i64(copies_.size())});
    for (i64 tap = 0; tap < s.taps(); tap++) taps_.push_back(planes_.offset_of_tap(tap));
  }

  i64 scratch_elements(i64 images) const {
    return at_once_ ? images * image : in_place_ ? 0 : planes_.scratch_elements(images);
  }
  // Images whose panels are laid out at a time; if panels are laid out where they are used, their planes are.
  i64 images() const {
    return !at_once_ && in_place_ ? shape_.images : max<i64>(1, min(shape_.images, kLaidOut / image));
  }

  // Returns the `x` that `panel` and `column` take.
  const T* lay_out_images(const T* x, i64 images, T* to, ParallelFor parallel_for) const {
    if (at_once_)
      lay_out_panels(x, images, to, parallel_for);
    else if (in_place_)
      return x;
    else
      planes_.lay_out_images(x, images, to, parallel_for);
    return to;
  }

  i64 count() const { return panels_.size() - 1; }
  i64 first(i64 panel) const { return panels_[panel].first; }
  int vectors(i64 panel) const { return panels_[panel].vectors; }

  // A panel for the channels of a group; if it isn't laid out yet, it is laid out in the buffer.
  const T* panel(const T* x, i64 group, i64 index, Buffer<T>& buffer) const {
    const Panel& panel = panels_[index];
    if (at_once_) return x + (panel.first * elements_ + group * shape_.elements() * panel.vectors) * kLanes<T>;
    T* to = buffer.of(shape_.elements() * panel.vectors * kLanes<T>);
    gather(index, x + group * shape_.group_in() * planes_.plane, 0, shape_.group_in(), to);
    return to;
  }

  // The elements that the last pixel reads, or null if it is in the last panel.
  const T* column(const T* x, i64 group, Buffer<T>& buffer) const {
    if (!column_) return nullptr;
    if (at_once_) return x + elements_ * vectors() * kLanes<T> + group * shape_.elements();
    T* to = buffer.of(shape_.elements());
    gather_column(x + group * shape_.group_in() * planes_.plane, 0, shape_.group_in(), to);
    return to;
  }

  static constexpr bool kOffsets = false;  // panels have the elements in the kernel's order
  i64 pitch() const { return shape_.out_width; }

 private:
  // Channels that are gathered at a time, and elements of their planes, which stay in the innermost cache.
  static constexpr i64 kChannels = 16, kPlanes = 4096;

  struct Panel {
    i64 first;
    int vectors, whole;  // vectors, and the number of copies that are whole vectors, which come first
    i64 copies;          // the first of its copies
  };
  // `count` neighbouring elements, from a plane to a panel.
  struct Copy {
    int32_t from, to, count;
  };

  void lay_out_panels(const T* x, i64 images, T* panels, ParallelFor parallel_for) const {
    const Shape& s = shape_;
    const i64 together = planes_.channels_together();
    const i64 most = in_place_ ? kChannels : rounded_up(max<i64>(1, min(kChannels, kPlanes / planes_.plane)), together);
    const i64 blocks = divided_up(s.in_channels, most);
    const i64 grain = max<i64>(1, 8192 / (most * s.taps() * s.pixels()));
    parallel(parallel_for, images * blocks, grain, [&](i64 begin, i64 end) {
      static thread_local Buffer<T> buffer;
      T* planes = nullptr;
      if (!in_place_) {
        planes = buffer.of(most * planes_.plane + kLanes<T>);
        planes_.clear(planes, most);
      }
      for (; begin < end; begin++) {
        const i64 n = begin / blocks, first = begin % blocks * most, channels = min(most, s.in_channels - first);
        const T* from = x + n * s.x_image + first * s.x_channel;
        if (!in_place_)
          for (i64 c = 0; c < channels; c += together)
            planes_.lay_out(from + c * s.x_channel, min(together, channels - c), planes + c * planes_.plane);
        for (i64 panel = 0; panel + 1 < i64(panels_.size()); panel++)
          gather(panel, in_place_ ? from : planes, first, channels,
                 panels + n * image + panels_[panel].first * kLanes<T> * elements_);
        if (column_)
          gather_column(in_place_ ? from : planes, first, channels,
                        panels + n * image + vectors() * kLanes<T> * elements_);
      }
    });
  }

  // Vectors of pixels in all panels.
  i64 vectors() const { return pixels_.vectors() - column_; }

  // The element of a kernel's row that belongs to an input channel and a tap.
  i64 element(i64 channel, i64 tap) const {
    const i64 group_in = shape_.group_in(), taps = shape_.taps();
    return shape_.bank_last ? channel / group_in * shape_.elements() + tap * group_in + channel % group_in
                            : channel * taps + tap;
  }

  void gather_column(const T* planes, i64 first, i64 channels, T* column) const {
    const i64 pixel = (shape_.out_height - 1) * planes_.pitch() + shape_.out_width - 1;
    for (i64 c = first; c < first + channels; c++, planes += planes_.plane)
      for (i64 tap = 0; tap < shape_.taps(); tap++) column[element(c, tap)] = planes[taps_[tap] + pixel];
  }

  void add_copies(Panel& panel) {
    const i64 width = shape_.out_width, lanes = panel.vectors * kLanes<T>;
    const auto plane_element = [&](i64 lane) {
      const i64 pixel = pixels_.start(panel.first + lane / kLanes<T>) + lane % kLanes<T>;
      return pixel / width * planes_.pitch() + pixel % width;
    };
    const i64 end = shape_.pixels() < kLanes<T> ? shape_.pixels() : lanes;
    for (i64 lane = 0, run; lane < end; lane += run) {
      for (run = 1; lane + run < end && plane_element(lane + run) == plane_element(lane) + run;) run++;
      for (i64 i = 0; i < run; i += kLanes<T>) {
        const bool beyond = lane + i + kLanes<T> > lanes;
        const i64 at = beyond && run >= kLanes<T> ? lanes - kLanes<T> : lane + i;
        // A whole vector may write beyond its run: the next copy writes over that. Nothing may be written beyond the
        // panel's row.
        const i64 count = at + kLanes<T> > lanes ? run - i : kLanes<T>;
        if (count == kLanes<T>) panel.whole++;
        copies_.push_back({int32_t(plane_element(lane) + at - lane), int32_t(at), int32_t(count)});
      }
    }
  }

  // Gathers the elements of some channels that a panel's pixels read.
  void gather(i64 index, const T* planes, i64 first, i64 channels, T* to_panel) const {
    static constexpr void (Panels::*kGatherPointwise[])(const Panel&, const T*, i64, T*) const = {
        &Panels::gather_pointwise<1>, &Panels::gather_pointwise<2>, &Panels::gather_pointwise<3>};
    static constexpr void (Panels::*kGather[])(const Panel&, const T*, i64, i64, T*) const = {
        &Panels::gather_copies<0>, &Panels::gather_copies<1>, &Panels::gather_copies<2>, &Panels::gather_copies<3>,
        &Panels::gather_copies<4>, &Panels::gather_copies<5>, &Panels::gather_copies<6>};
    const Panel& panel = panels_[index];
    if (shape_.taps() == 1)
      (this->*kGatherPointwise[panel.vectors - 1])(panel, planes, channels,
                                                   to_panel + first * panel.vectors * kLanes<T>);
    else
      (this->*(panel.whole <= 6 ? kGather[panel.whole] : &Panels::gather_copies<-1>))(panel, planes, first, channels,
                                                                                     to_panel);
  }

  // The same for 1 x 1 convs, whose pixels lie one behind the other in the planes, too.
  template <int kVectors>
  void gather_pointwise(const Panel& panel, const T* planes, i64 channels, T* to) const {
    const T* from = planes + pixels_.start(panel.first);
    const T* last = planes + pixels_.start(panel.first + kVectors - 1);
    const i64 plane = planes_.plane;
    for (i64 c = 0; c < channels; c++, from += plane, last += plane, to += kVectors * kLanes<T>) {
      for (int j = 0; j < kVectors - 1; j++) store(to + j * kLanes<T>, load(from + j * kLanes<T>));
      store(to + (kVectors - 1) * kLanes<T>, load(last));
    }
  }

  // kWhole: how many copies are whole vectors, or -1 for any number.
  template <int kWhole>
  void gather_copies(const Panel& panel, const T* planes, i64 first, i64 channels, T* to_panel) const {
    const Copy* copies = copies_.data() + panel.copies;
    const Copy* whole = copies + panel.whole;
    const Copy* end = copies_.data() + (&panel)[1].copies;
    const i64 row = panel.vectors * kLanes<T>, taps = shape_.taps(), step = taps > 1 ? element(0, 1) * row : 0;
    i64 from[max(1, kWhole)], at[max(1, kWhole)];
    for (int i = 0; i < kWhole; i++) from[i] = copies[i].from, at[i] = copies[i].to;
    for (i64 c = first; c < first + channels; c++, planes += planes_.plane) {
      T* to = to_panel + element(c, 0) * row;
      for (i64 tap = 0; tap < taps; tap++, to += step) {
        const T* x = planes + taps_[tap];
        for (int i = 0; i < kWhole; i++) store(to + at[i], load(x + from[i]));
        for (const Copy* copy = kWhole < 0 ? copies : whole; copy < whole; copy++)
          store(to + copy->to, load(x + copy->from));
        for (const Copy* copy = whole; copy < end; copy++)
          for (i64 i = 0; i < copy->count; i++) to[copy->to + i] = x[copy->from + i];
      }
    }
  }

  const Shape shape_;
  const Planes<T> planes_;
  const Pixels<T> pixels_;
  const bool column_, at_once_;
  const i64 elements_;  // of the kernels of all groups together
  const bool in_place_;
  std::vector<Panel> panels_;
  std::vector<Copy> copies_;
  std::vector<int32_t> taps_;

 public:
  const i64 image;  // elements from image to image
};

}  // namespace DYCONVERT_TARGET
