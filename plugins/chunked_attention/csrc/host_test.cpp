// What TensorRT asks of the plugin library on the host, asked without TensorRT and without a GPU: host_test LIBRARY
#include <NvInfer.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

void expect(bool holds, char const* what)
{
    if (holds) return;
    std::printf("FAILED: %s\n", what);
    std::exit(1);
}

class Heard final : public ILogger {
public:
    void log(Severity, AsciiChar const* text) noexcept override { last = text; }
    std::string last;
};

class Finder final : public ILoggerFinder {
public:
    ILogger* findLogger() override { return &logger; }
    Heard logger;
};

struct Given {
    float scale = 0.125F;
    int32_t sink = 4, left = 1, anchors = 2, head_dim = 64;
    int64_t groups = 7;  // as a network API states it

    std::vector<PluginField> fields() const
    {
        return {{"scale", &scale, PluginFieldType::kFLOAT32, 1}, {"sink", &sink, PluginFieldType::kINT32, 1},
            {"left", &left, PluginFieldType::kINT32, 1}, {"anchors", &anchors, PluginFieldType::kINT32, 1},
            {"head_dim", &head_dim, PluginFieldType::kINT32, 1}, {"groups", &groups, PluginFieldType::kINT64, 1}};
    }
};

template <typename T>
T value_of(PluginFieldCollection const* all, char const* name)
{
    for (int32_t i = 0; i < all->nbFields; ++i)
        if (std::strcmp(all->fields[i].name, name) == 0) return *static_cast<T const*>(all->fields[i].data);
    expect(false, name);
    return T{};
}

DynamicPluginTensorDesc tensor(DataType type, std::vector<int64_t> const& shape)
{
    DynamicPluginTensorDesc made{};
    made.desc.type = type;
    made.desc.format = TensorFormat::kLINEAR;
    made.desc.dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) made.desc.dims.d[i] = shape[i];
    made.min = made.max = made.opt = made.desc.dims;
    return made;
}

}  // namespace

int main(int num, char** words)
{
    expect(num == 2, "usage: host_test LIBRARY");
    void* const library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    expect(library != nullptr, "the library loads");
    auto const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    expect(creators != nullptr && set_finder != nullptr, "both symbols are there");
    Finder finder;
    set_finder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const first = creators(count)[0];
    expect(count == 1 && std::strcmp(first->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "one creator of the third kind");
    auto* const creator = static_cast<IPluginCreatorV3One*>(first);
    expect(std::strcmp(creator->getPluginName(), "ChunkedAttention") == 0 && std::strcmp(creator->getPluginNamespace(), "thoughtx") == 0
            && std::strcmp(creator->getPluginVersion(), "1") == 0 && creator->getFieldNames()->nbFields == 6,
        "its name, namespace, version and fields");

    Given given;
    auto fields = given.fields();
    PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> made{creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD)};
    expect(made != nullptr, "a plugin is made");
    std::unique_ptr<IPluginV3> plugin{made->clone()};
    made.reset();  // a clone must not point into what it was cloned from
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    expect(build->getNbOutputs() == 1, "one output");

    auto const half = DataType::kHALF, wide = DataType::kINT64;
    std::vector<DynamicPluginTensorDesc> io{tensor(half, {2, 14, 5, 64}), tensor(half, {2, 2, 900, 64}), tensor(half, {2, 2, 900, 64}),
        tensor(wide, {2, 5}), tensor(wide, {2, 900}), tensor(wide, {2}), tensor(half, {2, 14, 5, 64})};
    for (int32_t i = 0; i < 7; ++i) expect(build->supportsFormatCombination(i, io.data(), 6, 1), "float16 with int64 positions");
    io[6].desc.type = DataType::kBF16;
    expect(!build->supportsFormatCombination(6, io.data(), 6, 1), "one type for q, k, v and y");
    io[6].desc.type = half;
    io[3].desc.type = DataType::kINT32;
    expect(!build->supportsFormatCombination(3, io.data(), 6, 1), "positions are int64");
    io[3].desc.type = wide;
    io[0].desc.format = TensorFormat::kCHW32;
    expect(!build->supportsFormatCombination(0, io.data(), 6, 1), "linear layouts alone");
    io[0].desc.format = TensorFormat::kLINEAR;
    io[0].desc.type = DataType::kFLOAT;
    expect(!build->supportsFormatCombination(0, io.data(), 6, 1), "no float32");
    io[0].desc.type = half;
    DataType types[1], inputs[6] = {half, half, half, wide, wide, wide};
    expect(build->getOutputDataTypes(types, 1, inputs, 6) == 0 && types[0] == half, "the output has q's type");
    expect(build->configurePlugin(io.data(), 6, &io[6], 1) == 0, "the shapes fit");
    size_t const small = build->getWorkspaceSize(io.data(), 6, &io[6], 1);
    auto larger = io;
    larger[0] = tensor(half, {2, 14, 512, 64});
    expect(small > 0 && build->getWorkspaceSize(larger.data(), 6, &larger[6], 1) >= small, "workspace that does not shrink");
    auto odd = io;
    odd[0] = tensor(half, {2, 13, 5, 64});
    expect(build->configurePlugin(odd.data(), 6, &odd[6], 1) != 0 && finder.logger.last.find("do not fit") != std::string::npos,
        "shapes that do not fit are refused with a reason");

    std::unique_ptr<IPluginV3> restored{creator->createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME)};
    expect(restored != nullptr, "a plugin is made of what was serialized");
    auto* const again = static_cast<IPluginV3OneRuntime*>(restored->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* const kept = again->getFieldsToSerialize();
    expect(value_of<float>(kept, "scale") == 0.125F && value_of<int32_t>(kept, "sink") == 4 && value_of<int32_t>(kept, "left") == 1
            && value_of<int32_t>(kept, "anchors") == 2 && value_of<int32_t>(kept, "head_dim") == 64 && value_of<int32_t>(kept, "groups") == 7,
        "every attribute survives");

    struct Bad { char const* what; void (*spoil)(Given&); char const* reason; };
    for (Bad const& bad : {Bad{"scale", [](Given& g) { g.scale = 0.0F; }, "scale"}, Bad{"sink", [](Given& g) { g.sink = -1; }, "negative"},
             Bad{"left", [](Given& g) { g.left = -1; }, "negative"}, Bad{"head_dim", [](Given& g) { g.head_dim = 80; }, "head_dim is 80"},
             Bad{"groups", [](Given& g) { g.groups = 0; }, "groups"}}) {
        Given spoiled;
        bad.spoil(spoiled);
        auto wrong = spoiled.fields();
        PluginFieldCollection const all{static_cast<int32_t>(wrong.size()), wrong.data()};
        std::unique_ptr<IPluginV3> const refused{creator->createPlugin("layer", &all, TensorRTPhase::kBUILD)};
        expect(refused == nullptr && finder.logger.last.find(bad.reason) != std::string::npos, bad.what);
    }
    PluginFieldCollection const fewer{static_cast<int32_t>(fields.size()) - 1, fields.data() + 1};
    std::unique_ptr<IPluginV3> const missing{creator->createPlugin("layer", &fewer, TensorRTPhase::kBUILD)};
    expect(missing == nullptr && finder.logger.last.find("scale is missing") != std::string::npos, "a missing attribute is refused");
    fields.push_back({"unknown", &given.sink, PluginFieldType::kINT32, 1});
    collection = {static_cast<int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> const refused{creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD)};
    expect(refused == nullptr && finder.logger.last.find("unknown") != std::string::npos, "an unknown attribute is refused");
    std::printf("host test passed, TensorRT %d headers\n", NV_TENSORRT_MAJOR);
    return 0;
}
