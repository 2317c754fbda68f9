// For debugging: does each tensor of a launch lie on the launch's device? The driver knows; asking takes about as long as a
// launch, so it is off until check_pointers(true). device/checks.h asks here for every tensor that it checks.
#include <atomic>

#include "device/checks.h"
#include "device/platform.cuh"

namespace megakern {
namespace {

std::atomic<bool> checked{false};
thread_local int launching = -1;  // the device of this thread's call

struct Origin {
  enum Kind { host, device, managed } kind;
  int number;
};

#if defined(MEGAKERN_SIMT)

// The CPU plays device -1, and all memory is its own, but for what a test says of one address.
std::atomic<const void*> pretended{nullptr};
std::atomic<int> pretended_device{0};

Origin origin_of(const void* pointer) {
  if (pointer != pretended) return {Origin::device, -1};
  const int number = pretended_device;
  return {number < 0 ? Origin::host : Origin::device, number};
}

#else

Origin origin_of(const void* pointer) {
  cudaPointerAttributes known = {};
  const cudaError_t error = cudaPointerGetAttributes(&known, pointer);
  if (error != cudaSuccess) {
    cudaGetLastError();  // no error is left for somebody else's next call
    throw std::runtime_error(std::string("cudaPointerGetAttributes failed: ") + cudaGetErrorString(error));
  }
  const bool managed = known.type == cudaMemoryTypeManaged;
  if (!managed && known.type != cudaMemoryTypeDevice) return {Origin::host, -1};
  return {managed ? Origin::managed : Origin::device, known.device};
}

#endif

}  // namespace

void check_pointers(bool on) { checked = on; }
void launching_on(int device) { launching = device; }

#if defined(MEGAKERN_SIMT)
void pretend_pointer(std::uintptr_t address, int device) {
  pretended = reinterpret_cast<const void*>(address);
  pretended_device = device;
}
#endif

void Checks::origin(const char* name, const void* pointer) const {
  if (!checked) return;
  const Origin origin = origin_of(pointer);
  if (origin.kind == Origin::managed || (origin.kind == Origin::device && origin.number == launching)) return;
  const std::string place = origin.kind == Origin::host ? "the host's memory" : "device " + std::to_string(origin.number);
  require(false, std::string(name) + " must lie on device " + std::to_string(launching) + ", where the launch is, got an address of " +
                     place + "; move it there");
}

}  // namespace megakern
