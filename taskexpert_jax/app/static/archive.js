// Reads the server's answer: a ZIP file without compression, whose arrays are .npy files.

const END = 0x06054b50, ENTRY = 0x02014b50;
const ARRAYS = {
  "|u1": Uint8Array, "<f4": Float32Array, "<f8": Float64Array, "<i4": Int32Array, "<i8": BigInt64Array,
};

/** The files of a ZIP archive: Map of name -> Uint8Array, views into its buffer. */
export function unzip(buffer) {
  const view = new DataView(buffer);
  const end = buffer.byteLength - 22;  // the archive has no comment
  if (end < 0 || view.getUint32(end, true) !== END) throw new Error("the server's answer is cut short");
  const files = new Map();
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (view.getUint32(at, true) !== ENTRY) throw new Error("the server's answer is damaged");
    const size = view.getUint32(at + 20, true), nameLength = view.getUint16(at + 28, true);
    const skip = view.getUint16(at + 30, true) + view.getUint16(at + 32, true), local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, nameLength));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    files.set(name, new Uint8Array(buffer, start, size));
    at += 46 + nameLength + skip;
  }
  return files;
}

/** The array of a .npy file of version 1, in C order: {shape, data}. */
export function readArray(bytes) {
  const headerLength = bytes[8] + 256 * bytes[9];
  const header = new TextDecoder().decode(bytes.subarray(10, 10 + headerLength));
  const dtype = /'descr': '([^']+)'/.exec(header)?.[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)?.[1].split(",").filter((text) => text.trim()).map(Number);
  if (!(dtype in ARRAYS) || !shape || !header.includes("'fortran_order': False")) {
    throw new Error(`an array of the server's answer cannot be read: ${header}`);
  }
  const content = bytes.slice(10 + headerLength);  // a copy, whose values are aligned
  return {shape, data: new ARRAYS[dtype](content.buffer)};
}
