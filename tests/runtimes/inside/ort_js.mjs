// onnxruntime-node and onnxruntime-web in Node.js: `how` is the package.

import { createRequire } from "node:module";

const require = createRequire(process.env.MODULES + "/");

export async function run(job, samples, how) {
  const ort = require(how);
  const options = how === "onnxruntime-web" ? { executionProviders: ["wasm"] } : {};
  const session = await ort.InferenceSession.create(job.model, options);
  const got = [];
  for (const { data, shape } of samples) {
    const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", data, shape) });
    const y = outputs[session.outputNames[0]];
    got.push({ data: Float32Array.from(y.data), shape: [...y.dims] });
  }
  await session.release();
  return got;
}
