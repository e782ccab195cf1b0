// Text to tokens and back, as gradfn.data's tokenizers do it: characters, bytes, or none (tokens typed as integers).

// Returns { tokens, unknown }: unknown are the characters (or words, where tokens are integers) that the model does not
// have. Of a model of lines, tokens start with the end of the line before, as in training.
export function encode(model, text) {
  const kind = model.tokenizer ? model.tokenizer.name : "integers";
  const { tokens, unknown } = encoders[kind](model, text);
  if (startsLines(model) && tokens[0] !== newLine(model)) tokens.unshift(newLine(model));
  return { tokens: Int32Array.from(tokens), unknown: [...new Set(unknown)] };
}

const encoders = {
  characters(model, text) {
    const symbols = symbolsOf(model), known = new Map(symbols.map((symbol, token) => [symbol, token]));
    const letters = Array.from(text);
    return {
      tokens: letters.filter((letter) => known.has(letter)).map((letter) => known.get(letter)),
      unknown: letters.filter((letter) => !known.has(letter)),
    };
  },
  bytes: (model, text) => ({ tokens: Array.from(new TextEncoder().encode(text)), unknown: [] }),
  integers(model, text) {
    const words = text.split(/[\s,]+/).filter(Boolean);
    const known = (word) => /^\d{1,9}$/.test(word) && Number(word) < model.config.vocab;
    return { tokens: words.filter(known).map(Number), unknown: words.filter((word) => !known(word)) };
  },
};

// The exact text of tokens; bytes that are not UTF-8 become U+FFFD. Integers are separated by spaces.
export function decode(model, tokens) {
  if (!model.tokenizer) return Array.from(tokens).join(" ");
  if (model.tokenizer.name === "bytes") return new TextDecoder("utf-8", { ignoreBOM: true })
    .decode(Uint8Array.from(tokens));
  const symbols = symbolsOf(model);
  return Array.from(tokens, (token) => symbols[token]).join("");
}

const SHOWN = { "\n": "↵", "\t": "⇥", "\r": "␍" };

// What to show for each token: a line's end as ↵, bytes that are not characters on their own as \xE2.
export function names(model, tokens) {
  if (!model.tokenizer) return Array.from(tokens, String);
  const isBytes = model.tokenizer.name === "bytes", symbols = isBytes ? null : symbolsOf(model);
  return Array.from(tokens, (token) => {
    const text = isBytes ? String.fromCharCode(token) : symbols[token];
    const code = text.codePointAt(0);
    if (SHOWN[text]) return SHOWN[text];
    const hidden = code < 32 || (code > 126 && code < 160) || (isBytes && code > 126);
    return hidden ? `\\x${code.toString(16).toUpperCase().padStart(2, "0")}` : text;
  });
}

// The token that ends a line; -1 where the model lacks it.
export function newLine(model) {
  if (!model.tokenizer) return -1;
  return model.tokenizer.name === "bytes" ? 10 : symbolsOf(model).indexOf("\n");
}

function startsLines(model) {
  return model.lines && newLine(model) >= 0;
}

function symbolsOf(model) {
  return Array.from(model.tokenizer.symbols);
}
