// onnxruntime-web in headless Chromium: `how` is "wasm", or "webgpu" on SwiftShader, Chromium's GPU on the CPU.

import path from "node:path";

import { launch, serve } from "../browser.mjs";

let browser, page, server;

async function open(job, how) {
  const ort = path.join(process.env.MODULES, "onnxruntime-web", "dist");
  server = await serve({ ort, models: path.dirname(job.model), "": new URL(".", import.meta.url).pathname });
  browser = await launch({ webgpu: how === "webgpu" });
  page = await browser.newPage();
  await page.goto(server.url + "empty.html");
  await page.evaluate(async (how) => {
    globalThis.ort = await import(`/ort/ort.${how}.min.mjs`);
    globalThis.ort.env.wasm.numThreads = 1; // more need headers of the server
    globalThis.ort.env.logLevel = "error";
  }, how);
}

export async function run(job, samples, how) {
  if (!page) await open(job, how);
  const given = samples.map(({ data, shape }) => ({ data: [...data], shape }));
  const got = await page.evaluate(
    async ([name, given, how]) => {
      const session = await ort.InferenceSession.create(`/models/${name}`, { executionProviders: [how] });
      const outputs = [];
      for (const { data, shape } of given) {
        const x = new ort.Tensor("float32", Float32Array.from(data), shape);
        const y = (await session.run({ [session.inputNames[0]]: x }))[session.outputNames[0]];
        outputs.push({ data: [...(await y.getData())], shape: [...y.dims] });
      }
      await session.release();
      return outputs;
    },
    [path.basename(job.model), given, how],
  );
  return got.map(({ data, shape }) => ({ data: Float32Array.from(data), shape }));
}

export async function close() {
  await browser?.close();
  server?.close();
}
