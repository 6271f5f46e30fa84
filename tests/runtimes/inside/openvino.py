"""OpenVINO on the CPU. `how` is "extension" with our conversion of the node, which needs deploynorm on the path."""

import openvino


def run(job, samples, how):
    core = openvino.Core()
    if how == "extension":
        import deploynorm

        core.add_extension(deploynorm.openvino_extension())
    # By itself it takes bfloat16 where the processor has it.
    compiled = core.compile_model(core.read_model(job["model"]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [compiled([x])[0] for x in samples]
