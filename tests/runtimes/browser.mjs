// Headless Chromium on files of this machine, served over HTTP: a module is not loaded from a file:// address.

import fs from "node:fs";
import http from "node:http";
import { createRequire } from "node:module";
import path from "node:path";

const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".json": "application/json",
  ".css": "text/css", ".wasm": "application/wasm" };
const WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];

/** Serves folders by the first part of the path, {"ort": "/a/folder"}; the folder "" is for the others. */
export async function serve(folders) {
  const server = http.createServer((request, response) => {
    const parts = decodeURIComponent(new URL(request.url, "http://localhost").pathname).split("/").slice(1);
    const folder = parts.length > 1 && parts[0] in folders ? folders[parts.shift()] : folders[""];
    const file = folder && path.join(folder, path.normalize("/" + parts.join("/")));
    if (!file || !fs.existsSync(file) || !fs.statSync(file).isFile()) {
      response.writeHead(404).end();
      return;
    }
    response.writeHead(200, { "Content-Type": TYPES[path.extname(file)] ?? "application/octet-stream" });
    fs.createReadStream(file).pipe(response);
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  return { url: `http://127.0.0.1:${server.address().port}/`, close: () => server.close() };
}

/** Chromium of the system, or of the variable CHROMIUM; with WebGPU by SwiftShader where asked for. */
export async function launch({ webgpu = false } = {}) {
  const { chromium } = createRequire(process.env.MODULES + "/")("playwright-core");
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  if (!fs.existsSync(executablePath)) throw new Error(`there is no ${executablePath}: apt-get install chromium`);
  return chromium.launch({ executablePath, args: ["--no-sandbox", ...(webgpu ? WEBGPU : [])] });
}
