import { build, compute } from "gradfn/cnn/convnet.js";
export function start(section, content) { const { net } = build(content); return { net, build, compute }; }
