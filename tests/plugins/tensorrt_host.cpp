// What TensorRT does with a plugin library, in small: tests/tensorrt_host.py calls one method of a plugin's at a time.

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace nvinfer1;

namespace {

// ---- As ctypes has them

struct Tensor {
  int32_t type, format, rank;
  int64_t sizes[Dims::MAX_DIMS];    // -1 for one that only the shapes at run time give
  int64_t largest[Dims::MAX_DIMS];  // of the profile; as sizes at run time
};

struct Field {
  const char* name;
  int32_t type, length;
  const void* data;
};

Dims dims_of(int32_t rank, const int64_t* sizes) {
  Dims dims = {};
  dims.nbDims = rank;
  for (int32_t axis = 0; axis < rank; ++axis) dims.d[axis] = sizes[axis];
  return dims;
}

std::vector<PluginTensorDesc> described(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> all;
  for (const Tensor* each = tensors; each != tensors + count; ++each) {
    PluginTensorDesc desc = {};
    desc.dims = dims_of(each->rank, each->sizes);
    desc.type = static_cast<DataType>(each->type);
    desc.format = static_cast<TensorFormat>(each->format);
    desc.scale = 1;
    all.push_back(desc);
  }
  return all;
}

std::vector<DynamicPluginTensorDesc> described_for_build(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> all;
  for (const PluginTensorDesc& desc : described(tensors, count)) {
    DynamicPluginTensorDesc dynamic = {};
    dynamic.desc = desc;
    const Tensor& tensor = tensors[all.size()];
    dynamic.max = dims_of(tensor.rank, tensor.largest);
    dynamic.opt = dynamic.max;
    dynamic.min = dynamic.max;
    for (int32_t axis = 0; axis < tensor.rank; ++axis) {
      if (tensor.sizes[axis] < 0) dynamic.min.d[axis] = tensor.largest[axis] < 1 ? tensor.largest[axis] : 1;
    }
    all.push_back(dynamic);
  }
  return all;
}

template <typename Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

IPluginV3OneCore* core(IPluginV3* plugin) { return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE); }
IPluginV3OneBuild* build(IPluginV3* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

class Builder final : public IExprBuilder {};

}  // namespace

// ---- Its logger, which TensorRT 11 changed

namespace {

int32_t version = 0;
char logged[512];

void log(void*, int32_t severity, const char* message) { snprintf(logged, sizeof logged, "%d %s", severity, message); }

void* const kTable10[] = {reinterpret_cast<void*>(log), nullptr, nullptr};
void* const kTable11[] = {nullptr, nullptr, nullptr, nullptr, reinterpret_cast<void*>(log)};
void* const* const kLogger10 = kTable10;
void* const* const kLogger11 = kTable11;

}  // namespace

// The host is of this version from now on, and has a logger; 0: it has none.
EXPORTED void host_be(int32_t now) { version = now; }
EXPORTED const char* host_logged() { return logged; }

EXPORTED int32_t getInferLibVersion() noexcept { return version; }
EXPORTED ILogger* getLogger() noexcept {
  const bool old = version / 10000 == 10 || version == 10400;
  const void* found = version == 0 ? nullptr : old ? &kLogger10 : &kLogger11;
  return static_cast<ILogger*>(const_cast<void*>(found));
}

// ---- The library and its creator

// One of the two creators of a library; null, with dlerror() in `error`, for a library that cannot be loaded.
EXPORTED IPluginCreatorV3One* host_open(const char* path, int32_t index, const char** error) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    *error = dlerror();
    return nullptr;
  }
  using GetCreators = IPluginCreatorInterface* const*(int32_t& count);
  auto* get_creators = reinterpret_cast<GetCreators*>(dlsym(library, "getCreators"));
  auto* set_logger_finder = reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"));
  *error = "not exactly two creators of the third generation";
  if (get_creators == nullptr || set_logger_finder == nullptr) return nullptr;
  set_logger_finder(nullptr);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = get_creators(count);
  if (count != 2 || strcmp(creators[index]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return nullptr;
  return static_cast<IPluginCreatorV3One*>(creators[index]);
}

EXPORTED void host_creator_names(IPluginCreatorV3One* creator, const char** names) {
  names[0] = creator->getPluginName();
  names[1] = creator->getPluginVersion();
  names[2] = creator->getPluginNamespace();
}

EXPORTED int32_t host_attribute_count(IPluginCreatorV3One* creator) { return creator->getFieldNames()->nbFields; }

EXPORTED IPluginV3* host_create(IPluginCreatorV3One* creator, const Field* fields, int32_t count, int32_t phase) {
  std::vector<PluginField> all;
  for (const Field* each = fields; each != fields + count; ++each) {
    all.emplace_back(each->name, each->data, static_cast<PluginFieldType>(each->type), each->length);
  }
  const PluginFieldCollection collection = {count, all.data()};
  return creator->createPlugin("a layer", fields == nullptr ? nullptr : &collection, static_cast<TensorRTPhase>(phase));
}

// ---- IPluginV3 and what it is made of

EXPORTED void host_destroy(IPluginV3* plugin) { delete plugin; }
EXPORTED IPluginV3* host_clone(IPluginV3* plugin) { return plugin->clone(); }
EXPORTED IPluginV3* host_attach(IPluginV3* plugin) { return runtime(plugin)->attachToContext(nullptr); }
EXPORTED const char* host_timing_id(IPluginV3* plugin) { return build(plugin)->getTimingCacheID(); }

EXPORTED void host_names(IPluginV3* plugin, const char** names) {
  names[0] = core(plugin)->getPluginName();
  names[1] = core(plugin)->getPluginVersion();
  names[2] = core(plugin)->getPluginNamespace();
  names[3] = plugin->getInterfaceInfo().kind;
  names[4] = core(plugin)->getInterfaceInfo().kind;
  names[5] = build(plugin)->getInterfaceInfo().kind;
  names[6] = runtime(plugin)->getInterfaceInfo().kind;
}

EXPORTED int32_t host_fields(IPluginV3* plugin, Field* fields, int32_t most) {
  const PluginFieldCollection* all = runtime(plugin)->getFieldsToSerialize();
  for (int32_t index = 0; index < all->nbFields && index < most; ++index) {
    const PluginField& field = all->fields[index];
    fields[index] = {field.name, static_cast<int32_t>(field.type), field.length, field.data};
  }
  return all->nbFields;
}

// ---- While an engine is built

EXPORTED int32_t host_output_types(IPluginV3* plugin, const int32_t* in, int32_t inputs, int32_t* out,
                                   int32_t outputs) {
  std::vector<DataType> types, found(outputs, DataType::kBOOL);
  for (int32_t index = 0; index < inputs; ++index) types.push_back(static_cast<DataType>(in[index]));
  const int32_t code = build(plugin)->getOutputDataTypes(found.data(), outputs, types.data(), inputs);
  for (int32_t index = 0; index < outputs; ++index) out[index] = static_cast<int32_t>(found[index]);
  return code;
}

// For each axis of the first output, the axis of all inputs, numbered through, that it has the size of; -1 for another.
EXPORTED int32_t host_output_axes(IPluginV3* plugin, const int32_t* ranks, int32_t inputs, int32_t outputs,
                                  int32_t* rank, int32_t* axes) {
  static const char sizes[64 * Dims::MAX_DIMS] = {};  // addresses that stand for sizes; nobody may look inside
  std::vector<DimsExprs> in(inputs), out(outputs);
  for (int32_t index = 0; index < inputs; ++index) {
    in[index].nbDims = ranks[index];
    for (int32_t axis = 0; axis < ranks[index] && axis < Dims::MAX_DIMS; ++axis) {
      in[index].d[axis] = reinterpret_cast<const IDimensionExpr*>(sizes + index * Dims::MAX_DIMS + axis);
    }
  }
  Builder builder;
  const int32_t code = build(plugin)->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, builder);
  *rank = out[0].nbDims;
  for (int32_t axis = 0; axis < *rank && axis < Dims::MAX_DIMS; ++axis) {
    const auto* size = reinterpret_cast<const char*>(out[0].d[axis]);
    axes[axis] = size >= sizes && size < sizes + sizeof sizes ? static_cast<int32_t>(size - sizes) : -1;
  }
  return code;
}

EXPORTED int32_t host_supports(IPluginV3* plugin, int32_t position, const Tensor* tensors, int32_t inputs,
                               int32_t outputs) {
  const auto all = described_for_build(tensors, inputs + outputs);
  return build(plugin)->supportsFormatCombination(position, all.data(), inputs, outputs);
}

EXPORTED int32_t host_configure(IPluginV3* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  const auto all = described_for_build(tensors, inputs + outputs);
  return build(plugin)->configurePlugin(all.data(), inputs, all.data() + inputs, outputs);
}

EXPORTED size_t host_workspace(IPluginV3* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  const auto all = described_for_build(tensors, inputs + outputs);
  return build(plugin)->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
}

// ---- While it runs

EXPORTED int32_t host_shape_change(IPluginV3* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  const auto all = described(tensors, inputs + outputs);
  return runtime(plugin)->onShapeChange(all.data(), inputs, all.data() + inputs, outputs);
}

// The pointers are the device's.
EXPORTED int32_t host_enqueue(IPluginV3* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs,
                              const void* const* in, void* const* out, void* workspace, void* stream) {
  const auto all = described(tensors, inputs + outputs);
  return runtime(plugin)->enqueue(all.data(), all.data() + inputs, in, out, workspace,
                                  static_cast<cudaStream_t>(stream));
}
