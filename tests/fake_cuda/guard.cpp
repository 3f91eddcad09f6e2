// A CUDA device without a GPU, for a CPU build of torch.
//
// Autograd and autocast call the device guard and the CUDA hooks of a tensor's device before they run. A CPU build has
// neither, and its process ends. These two report one device and do nothing else. The library must be preloaded: torch
// reads its hooks while it is imported.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kCuda = c10::DeviceType::CUDA;

const c10::Device& onlyDevice() {
  static const c10::Device device(kCuda, 0);
  return device;
}

class FakeGuard final : public c10::impl::NoOpDeviceGuardImpl<kCuda> {
 public:
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }

  c10::Device getDevice() const override {
    return onlyDevice();
  }

  c10::Device exchangeDevice(c10::Device) const override {
    return onlyDevice();
  }

  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, onlyDevice());
  }

  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }

  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return stream;
  }
};

class FakeHooks : public at::CUDAHooksInterface {
 public:
  explicit FakeHooks(at::CUDAHooksArgs) {}

  void init() const override {}

  bool hasCUDA() const override {
    return true;
  }

  bool isBuilt() const override {
    return true;
  }

  bool isAvailable() const override {
    return true;
  }

  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }

  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }

  c10::DeviceIndex deviceCount() const override {
    return 1;
  }

  int getNumGPUs() const override {
    return 1;
  }
};

const FakeGuard guard;

// c10's own macro registers a guard by its type, which needs a name that is declared in c10::impl.
const bool isRegistered = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kCuda)].store(&guard);
  return true;
}();

} // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
} // namespace at
