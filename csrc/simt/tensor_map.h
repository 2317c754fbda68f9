// The CPU side of tensor_map.cuh: what cuTensorMapEncodeTiled keeps, checked as the driver checks it.
#pragma once

namespace megakern {

struct alignas(64) TensorMap {
  static constexpr int kRanks = 5;

  unsigned char* base;
  Dtype dtype;
  int rank, element;  // bytes of an element
  Swizzle swizzle;
  std::uint64_t size[kRanks], stride[kRanks];  // elements; bytes, stride[0] one element
  std::uint32_t box[kRanks];

  std::int64_t box_bytes() const {
    std::int64_t bytes = element;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};

inline TensorMap tensor_map(const void* base, Dtype dtype, int rank, const std::uint64_t* sizes,
                            const std::uint64_t* strides, const std::uint32_t* box, Swizzle swizzle) {
  const auto require = [](bool ok, const std::string& reason) {
    if (!ok) throw std::runtime_error("cuTensorMapEncodeTiled refused a tensor: " + reason);
  };
  require(dtype == Dtype::f32 || dtype == Dtype::bf16 || dtype == Dtype::f16, "the emulator has f32, bf16 and f16");
  require(rank >= 1 && rank <= TensorMap::kRanks, "rank must be 1 to 5, got " + std::to_string(rank));
  require(reinterpret_cast<std::uintptr_t>(base) % 16 == 0, "its address must be a multiple of 16");
  TensorMap map = {};
  map.base = static_cast<unsigned char*>(const_cast<void*>(base));
  map.dtype = dtype;
  map.rank = rank;
  map.element = dtype == Dtype::f32 ? 4 : 2;
  map.swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    const std::string which = " of dimension " + std::to_string(i);
    require(sizes[i] >= 1 && sizes[i] <= std::uint64_t(1) << 32, "size" + which + " must be 1 to 2^32");
    require(box[i] >= 1 && box[i] <= 256, "box" + which + " must be 1 to 256, got " + std::to_string(box[i]));
    map.size[i] = sizes[i];
    map.box[i] = box[i];
    map.stride[i] = i == 0 ? std::uint64_t(map.element) : strides[i - 1];
    require(i == 0 || (map.stride[i] % 16 == 0 && map.stride[i] < std::uint64_t(1) << 40),
            "stride" + which + " must be a multiple of 16 bytes below 2^40, got " + std::to_string(map.stride[i]));
  }
  const std::uint32_t width = box[0] * std::uint32_t(map.element);
  require(width % 16 == 0, "the box must be a multiple of 16 bytes wide, got " + std::to_string(width));
  require(swizzle == Swizzle::none || width <= 128, "a box under b128 must be 128 bytes wide, got " + std::to_string(width));
  require(swizzle == Swizzle::none || width == 128, "the emulator has b128 for boxes of 128 bytes, got " + std::to_string(width));
  return map;
}

}  // namespace megakern
