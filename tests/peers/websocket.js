// Node's ws as a service or as a visitor, for websocket.rs. It does what websocket.py says.
"use strict";

const assert = require("assert");
const crypto = require("crypto");
const { WebSocket, WebSocketServer } = require("ws");

const PASSING = ["date", "host", "sec-websocket-key", "sec-websocket-accept", "x-request-id"];
const REASON = "genug gr\u00fc\u00dfe";
const MOST = 256 << 20;

function lines(message) {
  const raw = message.rawHeaders;
  const kept = [];
  for (let at = 0; at < raw.length; at += 2) {
    const name = raw[at].toLowerCase();
    const lower = name === "connection" || name === "upgrade";
    if (!PASSING.includes(name) && !name.startsWith("x-forwarded-")) {
      kept.push([name, lower ? raw[at + 1].toLowerCase() : raw[at + 1]]);
    }
  }
  return kept.sort();
}

function serve() {
  const server = new WebSocketServer({
    host: "127.0.0.1",
    port: 0,
    maxPayload: MOST,
    perMessageDeflate: true,
    handleProtocols: (offer) => ["superchat", "chat"].find((one) => offer.has(one)) || false,
    verifyClient: ({ req }, done) =>
      done(req.url !== "/refuse", 401, "who are you?", { "WWW-Authenticate": 'Basic realm="x"' }),
  });
  server.on("listening", () => console.log(server.address().port));
  server.on("connection", (socket, request) => {
    const path = request.url;
    socket.on("error", () => {});
    if (path === "/headers") socket.send(JSON.stringify(lines(request)));
    if (path === "/ping") {
      socket.on("pong", (data) => socket.send(data.equals(Buffer.from("p")) ? "ponged" : "what?"));
      socket.ping("p");
    }
    socket.on("message", (data, binary) => {
      if (path === "/drop") return socket.terminate();
      if (path.startsWith("/close?")) return socket.close(Number(path.slice(7)), REASON);
      if (path !== "/pieces") return socket.send(data, { binary });
      socket.send(data.subarray(0, 1), { binary, fin: false });
      socket.send(data.subarray(1, 7), { binary, fin: false });
      socket.send(data.subarray(7), { binary, fin: true });
    });
  });
}

// A visitor's connection: what comes on it, in order.
class Visit {
  constructor(address, path, protocols, options) {
    this.come = [];
    this.waiting = null;
    this.socket = new WebSocket(`ws://${address}${path}`, protocols || [], {
      maxPayload: MOST,
      ...options,
    });
    const say = (...event) => {
      this.come.push(event);
      if (this.waiting) this.waiting();
    };
    this.socket.on("upgrade", (answer) => say("upgrade", lines(answer)));
    this.socket.on("open", () => say("open"));
    this.socket.on("message", (data, binary) => say("message", data, binary));
    this.socket.on("pong", (data) => say("pong", data.toString()));
    this.socket.on("close", (code, reason) => say("close", code, reason.toString()));
    this.socket.on("unexpected-response", (request, answer) => {
      const kept = lines(answer).filter(([name]) => name === "www-authenticate");
      let body = "";
      answer.on("data", (data) => (body += data));
      answer.on("end", () => say("refused", answer.statusCode, kept, body));
    });
    this.socket.on("error", (error) => say("error", error.message));
  }

  async next(kind) {
    while (!this.come.length) await new Promise((resolve) => (this.waiting = resolve));
    const [first, ...more] = this.come.shift();
    assert.strictEqual(first, kind, String(more));
    return more;
  }

  async open() {
    const [answer] = await this.next("upgrade");
    await this.next("open");
    return answer;
  }
}

async function visit(address, most) {
  const seen = [];
  async function echoed(one, message) {
    const binary = typeof message !== "string";
    const [data, wasBinary] = await one.next("message");
    assert.strictEqual(wasBinary, binary);
    assert.ok(data.equals(Buffer.from(message)), `${data.length} bytes`);
    const hash = crypto.createHash("sha256").update(data).digest("hex");
    seen.push([binary ? "binary" : "text", data.length, hash]);
  }
  // Bytes that look random and are the same each time.
  const random = (size) => {
    const cipher = crypto.createCipheriv("aes-128-ctr", Buffer.alloc(16), Buffer.alloc(16, 7));
    return cipher.update(Buffer.alloc(size));
  };

  for (const perMessageDeflate of [true, false]) {
    const one = new Visit(address, "/echo", [], { perMessageDeflate });
    seen.push(await one.open(), one.socket.extensions);
    for (const size of [0, 1, 125, 126, 65_535, 65_536, 300_000, most]) {
      for (const message of [random(size), "\u00e9".repeat(size / 2)]) {
        // What is large and doesn't repeat takes long to compress.
        const repeats = typeof message === "string";
        if (size > 1_000_000 && repeats !== perMessageDeflate) continue;
        const before = one.socket._socket.bytesRead;
        one.socket.send(message);
        await echoed(one, message);
        // Compressed is what repeats, if that was agreed upon.
        if (repeats && message.length > 100_000) {
          const small = one.socket._socket.bytesRead - before < message.length / 50;
          assert.strictEqual(small, one.socket.extensions.includes("permessage-deflate"));
          seen.push(["compressed", small]);
        }
      }
    }
    one.socket.send("abc", { fin: false });
    one.socket.send("", { fin: false });
    one.socket.ping("between");
    seen.push(await one.next("pong"));
    one.socket.send("defghijk", { fin: true });
    await echoed(one, "abcdefghijk");
    for (let number = 0; number < 300; number++) one.socket.send(`number ${number}`);
    for (let number = 0; number < 300; number++) {
      assert.strictEqual((await one.next("message"))[0].toString(), `number ${number}`);
    }
    one.socket.close(4000, REASON);
    seen.push(await one.next("close"));
  }
  let one = new Visit(address, "/pieces");
  await one.open();
  one.socket.send("in pieces on the way back");
  await echoed(one, "in pieces on the way back");
  one.socket.terminate();
  one = new Visit(address, "/ping");
  await one.open();
  seen.push((await one.next("message"))[0].toString());
  one.socket.terminate();
  one = new Visit(address, "/headers", [], { headers: { "X-Latin": "\u00b5" } });
  await one.open();
  seen.push(JSON.parse((await one.next("message"))[0]));
  one.socket.terminate();
  for (const offer of [["chat"], ["chat", "superchat"]]) {
    one = new Visit(address, "/echo", offer);
    await one.open();
    seen.push([offer, one.socket.protocol]);
    one.socket.terminate();
  }
  for (const path of ["/close?1000", "/close?1011", "/close?4999", "/drop"]) {
    one = new Visit(address, path);
    await one.open();
    one.socket.send("x");
    seen.push([path, ...(await one.next("close"))]);
  }
  one = new Visit(address, "/refuse");
  seen.push(["refused", ...(await one.next("refused"))]);
  console.log(JSON.stringify(seen));
  process.exit(0);
}

if (process.argv[2] === "server") serve();
else visit(process.argv[3], Number(process.argv[4]));
