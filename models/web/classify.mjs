// Classifies a picked image with model.onnx. How an image becomes its input, and the names of the classes, stand in the
// manifest beside it, model.deploynorm.json. Every file comes from the folder of this one; the image stays in the browser.

const TOP = 5;
const BITS = 22; // of a weight behind the binary point, in Pillow's resize of 8-bit images

const get = (id) => document.getElementById(id);

async function fetched(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

/** The network as its files describe it, opened. */
async function open() {
  const manifest = await (await fetched("model.deploynorm.json")).json();
  const { image, labels, onnx } = manifest;
  if (!image || !labels) {
    throw new Error("the manifest has no image and labels: export with --mean, --std and --labels");
  }
  if (onnx.inputs.length !== 1 || onnx.inputs[0].dtype !== "float32") {
    throw new Error("the network must have one input, in float32: export in half precision with --keep-io-types");
  }
  const bytes = new Uint8Array(await (await fetched("model.onnx")).arrayBuffer());
  if (globalThis.crypto?.subtle) { // absent where the page came neither by https nor from this machine
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    if ([...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") !== onnx.sha256) {
      throw new Error("model.onnx is not the file that model.deploynorm.json was written for");
    }
  }
  const ort = await import("./ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1; // more would require headers of the server
  return { ort, image, labels, session: await ort.InferenceSession.create(bytes) };
}

/** The pixels of a file as 8-bit channels side by side: grey by the weights of ITU-R 601, or red, green and blue. */
async function decode(file, channels) {
  const options = { colorSpaceConversion: "none", imageOrientation: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, options);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(width * height * channels);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    const [r, g, b] = [data[from], data[from + 1], data[from + 2]];
    if (channels === 1) {
      pixels[to++] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    } else {
      pixels[to++] = r;
      pixels[to++] = g;
      pixels[to++] = b;
    }
  }
  return { pixels, width, height, transparent: data.some((value, index) => index % 4 === 3 && value < 255) };
}

/** For each new position along an axis: the first old one, and the weights of it and those that follow. */
function weights(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1); // of the triangle; an image made smaller is averaged, one made larger interpolated
  return Array.from({ length: to }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), from);
    const exact = Array.from({ length: last - first }, (_, i) =>
      Math.max(1 - Math.abs((i + first - centre + 0.5) / support), 0));
    const sum = exact.reduce((a, b) => a + b, 0);
    return { first, values: exact.map((weight) => Math.trunc((weight / sum) * (1 << BITS) + 0.5)) };
  });
}

/** Bilinear with antialiasing, an axis at a time, each rounded to 8 bits: bit for bit what Pillow computes. */
function resize({ pixels, width, height }, channels, newWidth, newHeight) {
  const along = (source, outer, from, to, inner) => {
    if (from === to) return source;
    const target = new Uint8Array(outer * to * inner);
    weights(from, to).forEach(({ first, values }, index) => {
      for (let o = 0; o < outer; o++) {
        for (let i = 0; i < inner; i++) {
          let sum = 1 << (BITS - 1);
          values.forEach((weight, k) => { sum += source[(o * from + first + k) * inner + i] * weight; });
          target[(o * to + index) * inner + i] = Math.min(Math.max(sum >> BITS, 0), 255);
        }
      }
    });
    return target;
  };
  const wide = along(pixels, height, width, newWidth, channels);
  return along(wide, 1, height, newHeight, newWidth * channels);
}

/** The network's input, (1, C, H, W). */
function prepare(decoded, { shape: [C, H, W], mean, std }) {
  const pixels = resize(decoded, C, W, H);
  const input = new Float32Array(C * H * W);
  for (let c = 0; c < C; c++) {
    for (let i = 0; i < H * W; i++) input[c * H * W + i] = (pixels[i * C + c] / 255 - mean[c]) / std[c];
  }
  return input;
}

/** The most likely classes of a row of scores. */
function ranking(scores, labels) {
  const largest = Math.max(...scores);
  const exponentials = Array.from(scores, (score) => Math.exp(score - largest));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  const classes = labels.map((label, index) => ({ label, probability: exponentials[index] / sum }));
  return classes.sort((a, b) => b.probability - a.probability).slice(0, TOP);
}

async function classify({ ort, session, image, labels }, file) {
  const decoded = await decode(file, image.shape[0]).catch(() => {
    throw new Error(`${file.name}: not an image that this browser can read`);
  });
  const input = new ort.Tensor("float32", prepare(decoded, image), [1, ...image.shape]);
  const begin = performance.now();
  const outputs = await session.run({ [session.inputNames[0]]: input });
  const milliseconds = performance.now() - begin;
  const { data, dims } = outputs[session.outputNames[0]];
  if (dims.length !== 2 || dims[1] !== labels.length) {
    throw new Error(`the network returns (${dims.join(", ")}), not scores of ${labels.length} classes`);
  }
  return { classes: ranking(data, labels), milliseconds, transparent: decoded.transparent };
}

function show({ classes, milliseconds, transparent }) {
  get("classes").replaceChildren(...classes.map(({ label, probability }) => {
    const row = document.createElement("tr");
    row.insertCell().textContent = label;
    const cell = row.insertCell();
    cell.textContent = `${(100 * probability).toFixed(1)} %`;
    cell.title = String(probability);
    return row;
  }));
  get("classes").parentElement.hidden = false;
  const note = transparent ? "; the image is transparent in places, which `deploynorm run` would ignore" : "";
  get("state").textContent = `${milliseconds.toFixed(1)} ms${note}`;
}

async function main() {
  const network = await open();
  const picker = get("file");
  picker.addEventListener("change", async () => {
    const [file] = picker.files;
    if (!file) return;
    picker.disabled = true;
    get("error").textContent = "";
    get("state").textContent = "running";
    get("classes").parentElement.hidden = true;
    URL.revokeObjectURL(get("picture").src);
    get("picture").src = URL.createObjectURL(file);
    get("picture").hidden = false;
    try {
      show(await classify(network, file));
    } catch (error) {
      get("state").textContent = "";
      get("error").textContent = error.message;
    }
    picker.disabled = false;
  });
  picker.disabled = false;
  get("state").textContent = "ready";
}

main().catch((error) => {
  get("state").textContent = "";
  get("error").textContent = error.message;
});
