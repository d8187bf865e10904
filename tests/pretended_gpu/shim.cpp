// What a CPU-only torch lacks before autograd accepts tensors whose device is `cuda`: an answer to "is there CUDA?", and
// a guard that says which device and stream are current. No operator is registered here. Every operator on such tensors
// is answered by FakeTensorMode (device.py), which computes shapes and no numbers.
//
// torch asks for the hooks once and keeps the answer, so this library has to be loaded before torch is imported.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

namespace {

using c10::DeviceIndex;

// PRETENDED_GPUS says how many devices a process sees; autograd starts one thread for each.
DeviceIndex device_count() {
  static const DeviceIndex count = [] {
    const char* text = std::getenv("PRETENDED_GPUS");
    return static_cast<DeviceIndex>(text == nullptr ? 2 : std::atoi(text));
  }();
  return count;
}

thread_local DeviceIndex current = 0;

struct PretendedGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType kind = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device next) const override {
    c10::Device before(kind, current);
    current = next.index() < 0 ? current : next.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kind, current); }
  void setDevice(c10::Device next) const override { exchangeDevice(next); }
  void uncheckedSetDevice(c10::Device next) const noexcept override { current = next.index() < 0 ? current : next.index(); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kind, device.index() < 0 ? current : device.index()));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int = 0) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool = false) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  // One stream, which has always finished: order is what Python does, and races cannot be seen.
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)

} // namespace

namespace at {

struct PretendedCuda final : CUDAHooksInterface {
  explicit PretendedCuda(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex next) const override { current = next; }
  DeviceIndex exchangeDevice(DeviceIndex next) const override {
    DeviceIndex before = current;
    current = next < 0 ? current : next;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex next) const override { return exchangeDevice(next); }
  void deviceSynchronize(DeviceIndex) const override {}
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedCuda)

} // namespace at
