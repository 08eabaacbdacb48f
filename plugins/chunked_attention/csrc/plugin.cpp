// The operator as a TensorRT plugin (IPluginV3) in a shared library, for TensorRT 10.15 .. 11.x; one library for each major version.
//
// Compiles against NVIDIA's public headers and links no libnvinfer: TensorRT hands everything over. It has not run inside TensorRT.
#include <NvInfer.h>

#include <cstring>
#include <string>
#include <vector>

#include "launch.h"

using namespace nvinfer1;

namespace {

constexpr char kName[] = "ChunkedAttention", kVersion[] = "1", kNamespace[] = "thoughtx";
constexpr int32_t kNumInputs = 6, kFirstPositions = 3;

ILoggerFinder* finder = nullptr;

void complain(std::string const& what)
{
    ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) logger->log(ILogger::Severity::kERROR, ("thoughtx::ChunkedAttention: " + what).c_str());
}

struct Settings {
    float scale = 0.0F;
    int32_t sink = 0, left = 0, anchors = 0, head_dim = 0, groups = 0;

    // What is wrong; empty when nothing is.
    std::string problem() const
    {
        if (!(scale > 0.0F) || scale > 1.0e6F) return "scale must be a number above 0";
        if (sink < 0 || left < 0 || anchors < 0) return "sink, left and anchors must not be negative";
        if (groups < 1) return "groups must be at least 1";
        if (!thoughtx::takes_head_dim(head_dim)) return "head_dim is " + std::to_string(head_dim) + "; the kernels take 32, 64, 96 and 128";
        return "";
    }

    std::vector<PluginField> fields() const
    {
        return {{"scale", &scale, PluginFieldType::kFLOAT32, 1}, {"sink", &sink, PluginFieldType::kINT32, 1},
            {"left", &left, PluginFieldType::kINT32, 1}, {"anchors", &anchors, PluginFieldType::kINT32, 1},
            {"head_dim", &head_dim, PluginFieldType::kINT32, 1}, {"groups", &groups, PluginFieldType::kINT32, 1}};
    }

    // Takes a field of the parser (int32, float32) or of a network API (also int64, float64); false for one that it does not know.
    bool take(PluginField const& field)
    {
        if (field.data == nullptr || field.length != 1) return false;
        if (std::strcmp(field.name, "scale") == 0) {
            if (field.type == PluginFieldType::kFLOAT32) scale = *static_cast<float const*>(field.data);
            else if (field.type == PluginFieldType::kFLOAT64) scale = static_cast<float>(*static_cast<double const*>(field.data));
            else return false;
            return true;
        }
        struct Named { char const* name; int32_t* value; };
        for (Named const& one : {Named{"sink", &sink}, {"left", &left}, {"anchors", &anchors}, {"head_dim", &head_dim}, {"groups", &groups}}) {
            if (std::strcmp(field.name, one.name) != 0) continue;
            if (field.type == PluginFieldType::kINT32) *one.value = *static_cast<int32_t const*>(field.data);
            else if (field.type == PluginFieldType::kINT64) *one.value = static_cast<int32_t>(*static_cast<int64_t const*>(field.data));
            else return false;
            return true;
        }
        return std::strcmp(field.name, "plugin_namespace") == 0 || std::strcmp(field.name, "plugin_version") == 0;
    }
};

thoughtx::Call call_of(Settings const& settings, Dims const& q, Dims const& k, DataType type)
{
    auto const at = [](Dims const& dims, int i) { return static_cast<int32_t>(dims.d[i]); };
    return {at(q, 0), at(k, 1), settings.groups, at(q, 2), at(k, 2), settings.head_dim, settings.sink, settings.left, settings.anchors,
        settings.scale, type == DataType::kHALF ? thoughtx::Type::kHalf : thoughtx::Type::kBfloat16};
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(Settings const& settings) : settings_(settings), fields_(settings_.fields()) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        default: return nullptr;
        }
    }
    IPluginV3* clone() noexcept override { return new Plugin(settings_); }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t num_in, DynamicPluginTensorDesc const*, int32_t) noexcept override
    {
        Dims const &q = in[0].max, &k = in[1].max;
        bool const fits = num_in == kNumInputs && q.nbDims == 4 && k.nbDims == 4 && q.d[3] == settings_.head_dim && k.d[3] == q.d[3]
            && q.d[1] == k.d[1] * settings_.groups;
        if (!fits) complain("the shapes of q and k do not fit head_dim and groups");
        return fits ? 0 : -1;
    }
    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* io, int32_t, int32_t) noexcept override
    {
        PluginTensorDesc const& desc = io[at].desc;
        if (desc.format != TensorFormat::kLINEAR) return false;
        if (at == 0) return desc.type == DataType::kHALF || desc.type == DataType::kBF16;
        return at >= kFirstPositions && at < kNumInputs ? desc.type == DataType::kINT64 : desc.type == io[0].desc.type;
    }
    int32_t getOutputDataTypes(DataType* out, int32_t num_out, DataType const* in, int32_t num_in) const noexcept override
    {
        if (num_out != 1 || num_in != kNumInputs) return -1;
        out[0] = in[0];
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* in, int32_t num_in, DimsExprs const*, int32_t, DimsExprs* out, int32_t num_out,
        IExprBuilder&) noexcept override
    {
        if (num_out != 1 || num_in != kNumInputs) return -1;
        out[0] = in[0];
        return 0;
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        return thoughtx::workspace_bytes(call_of(settings_, in[0].max, in[1].max, in[0].desc.type));
    }

    int32_t setTactic(int32_t) noexcept override { return 0; }
    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override { return 0; }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) noexcept override
    {
        cudaError_t const status = thoughtx::run(call_of(settings_, in[0].dims, in[1].dims, in[0].type), inputs, outputs[0], workspace, stream);
        if (status != cudaSuccess) complain(cudaGetErrorString(status));
        return status == cudaSuccess ? 0 : -1;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

private:
    Settings settings_;
    std::vector<PluginField> fields_;  // point into settings_
    PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override
    {
        Settings settings;
        for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
            if (settings.take(given->fields[i])) continue;
            complain(std::string("attribute ") + given->fields[i].name + " is not known, or not of its type");
            return nullptr;
        }
        for (PluginField const& wanted : fields_) {  // a parser leaves out what a node does not state
            bool stated = false;
            for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) stated |= std::strcmp(given->fields[i].name, wanted.name) == 0;
            if (stated) continue;
            complain(std::string("attribute ") + wanted.name + " is missing");
            return nullptr;
        }
        std::string const problem = settings.problem();
        if (problem.empty()) return new Plugin(settings);
        complain(problem);
        return nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    std::vector<PluginField> fields_{{"scale", nullptr, PluginFieldType::kFLOAT32, 1}, {"sink", nullptr, PluginFieldType::kINT32, 1},
        {"left", nullptr, PluginFieldType::kINT32, 1}, {"anchors", nullptr, PluginFieldType::kINT32, 1},
        {"head_dim", nullptr, PluginFieldType::kINT32, 1}, {"groups", nullptr, PluginFieldType::kINT32, 1}};
    PluginFieldCollection collection_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

}  // namespace

// The two symbols that TensorRT looks up in a plugin library; without the first it registers nothing.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* given) { finder = given; }
extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& num_creators)
{
    static Creator creator;
    static IPluginCreatorInterface* const all[] = {&creator};
    num_creators = 1;
    return all;
}
