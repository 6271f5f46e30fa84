// serve.py for Node.js: `node serve.mjs ADAPTER HOW JOBS RESULTS`. An adapter exports run(job, samples, how), and close().

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [adapter, how, jobs, results] = process.argv.slice(2);
const { run, close } = await import(pathToFileURL(adapter));
const say = (line) => fs.appendFileSync(results, JSON.stringify(line) + "\n");

for (const job of JSON.parse(fs.readFileSync(jobs, "utf-8"))) {
  say({ begins: job.name });
  const samples = job.samples.map(({ path, shape }) => {
    const bytes = fs.readFileSync(path);
    return { shape, data: new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4) };
  });
  try {
    const outputs = (await run(job, samples, how)).map(({ data, shape }, index) => {
      const file = path.join(path.dirname(results), `${job.name}.y${index}.bin`);
      fs.writeFileSync(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
      return { path: file, shape };
    });
    say({ name: job.name, outputs });
  } catch (error) {
    say({ name: job.name, refused: String(error), traceback: String(error?.stack) });
  }
}
await close?.();
process.exit(0); // a session of onnxruntime-web keeps its threads
