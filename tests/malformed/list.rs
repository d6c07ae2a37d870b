//! The requests. What may reach the service of each is a request for `/own`, or nothing.
//!
//! A request hidden in another one asks for `/hidden`: nobody may take it for one of its own.

/// A request that no client should send.
pub struct Case {
    pub name: String,
    pub bytes: Vec<u8>,
    /// It isn't whole: whoever waits for the rest is right.
    pub incomplete: bool,
}

impl Case {
    fn incomplete(mut self) -> Self {
        self.incomplete = true;
        self
    }
}

fn case(name: impl Into<String>, bytes: impl AsRef<[u8]>) -> Case {
    Case {
        name: name.into(),
        bytes: bytes.as_ref().to_vec(),
        incomplete: false,
    }
}

/// One with this request line, which has its end with it.
fn line(name: &str, line: &[u8]) -> Case {
    case(format!("line: {name}"), [line, b"Host: h\r\n\r\n"].concat())
}

/// One with these lines beside Host.
fn field(name: &str, lines: &[u8]) -> Case {
    let bytes = [b"GET /own HTTP/1.1\r\nHost: h\r\n", lines, b"\r\n"].concat();
    case(format!("field: {name}"), bytes)
}

/// One with these lines instead of Host.
fn host(name: &str, lines: &[u8]) -> Case {
    let bytes = [b"GET /own HTTP/1.1\r\n", lines, b"\r\n"].concat();
    case(format!("host: {name}"), bytes)
}

/// One with these lines about its content, and this content.
fn content(name: &str, lines: &[u8], body: &[u8]) -> Case {
    let head = b"POST /own HTTP/1.1\r\nHost: h\r\n";
    let bytes = [head, lines, b"\r\n", body].concat();
    case(format!("content: {name}"), bytes)
}

/// One in chunks.
fn chunks(name: &str, body: &[u8]) -> Case {
    let mut case = content(name, b"Transfer-Encoding: chunked\r\n", body);
    case.name = format!("chunks: {name}");
    case
}

const HIDDEN: &[u8] = b"GET /hidden HTTP/1.1\r\nHost: h\r\n\r\n";

/// What says that the content is as long as the hidden request, or has none.
fn hiding(name: &str, lines: &str) -> Case {
    let lines = lines.replace("LENGTH", &HIDDEN.len().to_string());
    content(name, lines.as_bytes(), HIDDEN)
}

/// The whole list.
pub fn list() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(request_lines());
    all.extend(targets());
    all.extend(fields());
    all.extend(hosts());
    all.extend(lengths());
    all.extend(encodings());
    all.extend(chunked());
    all.extend(connections());
    all.extend(other_protocols());
    all
}

fn request_lines() -> Vec<Case> {
    vec![
        line("empty", b"\r\n\r\n"),
        line(
            "three empty lines before",
            b"\r\n\r\n\r\nGET /own HTTP/1.1\r\n",
        ),
        line("bare LF before", b"\nGET /own HTTP/1.1\r\n"),
        line("blank before", b" GET /own HTTP/1.1\r\n"),
        line("tab before", b"\tGET /own HTTP/1.1\r\n"),
        line("NUL before", b"\0GET /own HTTP/1.1\r\n"),
        line("UTF-8 mark before", b"\xef\xbb\xbfGET /own HTTP/1.1\r\n"),
        line("bare LF at its end", b"GET /own HTTP/1.1\n"),
        line("bare CR at its end", b"GET /own HTTP/1.1\r"),
        line("two CRs at its end", b"GET /own HTTP/1.1\r\r\n"),
        line("blank at its end", b"GET /own HTTP/1.1 \r\n"),
        line("tab at its end", b"GET /own HTTP/1.1\t\r\n"),
        line("two blanks before the target", b"GET  /own HTTP/1.1\r\n"),
        line("two blanks after the target", b"GET /own  HTTP/1.1\r\n"),
        line("tabs between its parts", b"GET\t/own\tHTTP/1.1\r\n"),
        line(
            "vertical tab between its parts",
            b"GET\x0b/own HTTP/1.1\r\n",
        ),
        line("form feed between its parts", b"GET /own\x0cHTTP/1.1\r\n"),
        line("bare CR between its parts", b"GET\r/own HTTP/1.1\r\n"),
        line(
            "no-break space between its parts",
            b"GET\xa0/own HTTP/1.1\r\n",
        ),
        line("four parts", b"GET /own a HTTP/1.1\r\n"),
        line("no method", b"/own HTTP/1.1\r\n"),
        line("only a method", b"GET\r\n"),
        line("method in small letters", b"get /own HTTP/1.1\r\n"),
        line("unknown method", b"FETCH /own HTTP/1.1\r\n"),
        line("method with a brace", b"GET{ /own HTTP/1.1\r\n"),
        line("method with a slash", b"GE/T /own HTTP/1.1\r\n"),
        line("method with a colon", b"GET: /own HTTP/1.1\r\n"),
        line("method with NUL", b"GE\0T /own HTTP/1.1\r\n"),
        line("method beyond ASCII", b"G\xc3\x89T /own HTTP/1.1\r\n"),
        line(
            "method of 10,000 letters",
            &[&[b'A'; 10_000][..], b" /own HTTP/1.1\r\n"].concat(),
        ),
        line("CONNECT", b"CONNECT h:443 HTTP/1.1\r\n"),
        line("CONNECT with a path", b"CONNECT /own HTTP/1.1\r\n"),
        line("TRACE", b"TRACE /own HTTP/1.1\r\n"),
        line("no version", b"GET /own\r\n"),
        line("HTTP/0.9 by its version", b"GET /own HTTP/0.9\r\n"),
        line("HTTP/1.2", b"GET /own HTTP/1.2\r\n"),
        line("HTTP/1.10", b"GET /own HTTP/1.10\r\n"),
        line("HTTP/2.0", b"GET /own HTTP/2.0\r\n"),
        line("HTTP/3", b"GET /own HTTP/3\r\n"),
        line("HTTP/1", b"GET /own HTTP/1\r\n"),
        line("HTTP/1.", b"GET /own HTTP/1.\r\n"),
        line("HTTP/.1", b"GET /own HTTP/.1\r\n"),
        line("HTTP/-1.1", b"GET /own HTTP/-1.1\r\n"),
        line("HTTP/01.1", b"GET /own HTTP/01.1\r\n"),
        line("HTTP/1,1", b"GET /own HTTP/1,1\r\n"),
        line("HTTP/1.1 with letters after it", b"GET /own HTTP/1.1x\r\n"),
        line("http/1.1", b"GET /own http/1.1\r\n"),
        line("HTTPS/1.1", b"GET /own HTTPS/1.1\r\n"),
        line("HTTP 1.1", b"GET /own HTTP 1.1\r\n"),
        line("ICY", b"GET /own ICY/1.0\r\n"),
    ]
}

fn targets() -> Vec<Case> {
    let target = |name: &str, target: &[u8]| {
        let request = [b"GET ", target, b" HTTP/1.1\r\n"].concat();
        line(&format!("target {name}"), &request)
    };
    vec![
        target("without a slash", b"own"),
        target("with a fragment", b"/own#part"),
        target("with NUL", b"/own\0"),
        target("with a control byte", b"/own\x01"),
        target("with DEL", b"/own\x7f"),
        target("with a bare CR", b"/o\rwn"),
        target("with a bare LF", b"/o\nwn"),
        target("with a vertical tab", b"/o\x0bwn"),
        target("beyond ASCII", b"/own/\xc3\xa4"),
        target("that isn't UTF-8", b"/own/\xff\xfe"),
        target("in quotes", b"\"/own\""),
        target("with a backslash", b"\\own"),
        target("of blanks", b" "),
        target("asterisk for GET", b"*"),
        target("authority for GET", b"h:80"),
        target("of another scheme", b"ftp://h/own"),
        target("absolute without a host", b"http:///own"),
        target("absolute with a user", b"http://user:secret@h/own"),
        target("absolute with a bad port", b"http://h:99999999/own"),
        target("absolute with one slash", b"http:/own"),
        target("absolute with a blank in its host", b"http://h h/own"),
        target("of 70,000 bytes", &[b"/", &[b'a'; 70_000][..]].concat()),
        target("with a cut escape", b"/own%2"),
        target("with a false escape", b"/own%zz"),
        target("with an escaped NUL", b"/own%00"),
    ]
}

fn fields() -> Vec<Case> {
    let many: Vec<u8> = (0..2000)
        .flat_map(|n| format!("X-{n}: a\r\n").into_bytes())
        .collect();
    vec![
        field("no colon", b"Broken\r\n"),
        field("only a colon", b":\r\n"),
        field("no name", b": a\r\n"),
        field("blank before the colon", b"X-A : a\r\n"),
        field("tab before the colon", b"X-A\t: a\r\n"),
        field("blank within the name", b"X A: a\r\n"),
        field("blank before the name", b"X-A: a\r\n X-B: b\r\n"),
        field("first line folded", b"").folded_first(),
        field("folded value", b"X-A: a\r\n\tb\r\n"),
        field("folded by blanks alone", b"X-A: a\r\n \r\n"),
        field("folded length", b"Content-Length:\r\n 5\r\n"),
        field("NUL in the name", b"X\0A: a\r\n"),
        field("control byte in the name", b"X\x01A: a\r\n"),
        field("name beyond ASCII", b"X-\xc3\xa4: a\r\n"),
        field("brackets in the name", b"X[A]: a\r\n"),
        field("quotes in the name", b"\"X\": a\r\n"),
        field("slash in the name", b"X/A: a\r\n"),
        field("CR in the name", b"X\rA: a\r\n"),
        field("NUL in the value", b"X-A: a\0b\r\n"),
        field("control byte in the value", b"X-A: a\x01b\r\n"),
        field("DEL in the value", b"X-A: a\x7fb\r\n"),
        field("bare CR in the value", b"X-A: a\rb\r\n"),
        field("bare CR and a field in the value", b"X-A: a\rX-B: b\r\n"),
        field("bare LF in the value", b"X-A: a\nX-B: b\r\n"),
        // Who takes a bare LF for the end of a line (RFC 9112, section 2.2) sees two requests, and so
        // do all three.
        field(
            "bare LFs and a second request",
            b"X-A: a\n\nGET /own-too HTTP/1.1\nHost: h\n\n",
        ),
        field("CR, CR, LF", b"X-A: a\r\r\n"),
        field("LF, CR", b"X-A: a\n\rX-B: b\r\n"),
        field(
            "name of 70,000 bytes",
            &[&[b'a'; 70_000][..], b": a\r\n"].concat(),
        ),
        field(
            "value of 70,000 bytes",
            &[b"X-A: ", &[b'a'; 70_000][..], b"\r\n"].concat(),
        ),
        field("2,000 of them", &many),
        case(
            "field: bare LF at the head's end",
            b"GET /own HTTP/1.1\r\nHost: h\r\nX-A: a\r\n\n",
        ),
        case("field: LF everywhere", b"GET /own HTTP/1.1\nHost: h\n\n"),
        case("field: CR everywhere", b"GET /own HTTP/1.1\rHost: h\r\r").incomplete(),
        case("field: none, and no end", b"GET /own HTTP/1.1\r\n").incomplete(),
        case(
            "field: head without end",
            b"GET /own HTTP/1.1\r\nHost: h\r\nX-A: a",
        )
        .incomplete(),
    ]
}

impl Case {
    /// The same with a line before Host that continues the request line.
    fn folded_first(mut self) -> Self {
        self.bytes = b"GET /own HTTP/1.1\r\n X-A: a\r\nHost: h\r\n\r\n".to_vec();
        self
    }
}

fn hosts() -> Vec<Case> {
    vec![
        host("none", b""),
        host("two", b"Host: h\r\nHost: h\r\n"),
        host("two that differ", b"Host: h\r\nHost: other\r\n"),
        host("two in one", b"Host: h, other\r\n"),
        host("a path", b"Host: h/own\r\n"),
        host("a user", b"Host: user@h\r\n"),
        host("a scheme", b"Host: http://h\r\n"),
        host("a query", b"Host: h?a\r\n"),
        host("a fragment", b"Host: h#a\r\n"),
        host("a backslash", b"Host: h\\a\r\n"),
        host("a blank", b"Host: h h\r\n"),
        host("a tab", b"Host: h\th\r\n"),
        host("NUL", b"Host: h\0h\r\n"),
        host("beyond ASCII", b"Host: h\xc3\xa4\r\n"),
        host("a port that is a word", b"Host: h:http\r\n"),
        host("a port beyond all", b"Host: h:65536\r\n"),
        host("a negative port", b"Host: h:-1\r\n"),
        host("two ports", b"Host: h:1:2\r\n"),
        host("half an address", b"Host: [::1\r\n"),
        host("a false address", b"Host: [::g]\r\n"),
        host("braces", b"Host: {h}\r\n"),
        host("a percent sign", b"Host: h%\r\n"),
        host(
            "70,000 bytes",
            &[b"Host: ", &[b'a'; 70_000][..], b"\r\n"].concat(),
        ),
        case(
            "host: none, the target absolute",
            b"GET http://h/own HTTP/1.1\r\n\r\n",
        ),
    ]
}

fn lengths() -> Vec<Case> {
    vec![
        hiding(
            "two lengths that differ",
            "Content-Length: 0\r\nContent-Length: LENGTH\r\n",
        ),
        hiding(
            "the same the other way round",
            "Content-Length: LENGTH\r\nContent-Length: 0\r\n",
        ),
        hiding(
            "two lengths, the same",
            "Content-Length: LENGTH\r\nContent-Length: LENGTH\r\n",
        ),
        hiding("a list of lengths", "Content-Length: LENGTH, LENGTH\r\n"),
        hiding(
            "a list of lengths that differ",
            "Content-Length: 0, LENGTH\r\n",
        ),
        hiding("a length and an empty one", "Content-Length: LENGTH,\r\n"),
        hiding("a plus", "Content-Length: +LENGTH\r\n"),
        hiding("a minus", "Content-Length: -LENGTH\r\n"),
        hiding("minus zero", "Content-Length: -0\r\n"),
        hiding("hexadecimal", "Content-Length: 0x21\r\n"),
        hiding("hexadecimal digits", "Content-Length: 2a\r\n"),
        hiding("a fraction", "Content-Length: LENGTH.0\r\n"),
        hiding("an exponent", "Content-Length: 3e1\r\n"),
        hiding("a blank within", "Content-Length: 3 3\r\n"),
        hiding("an underscore", "Content-Length: 3_3\r\n"),
        hiding("quotes", "Content-Length: \"LENGTH\"\r\n"),
        hiding("a vertical tab", "Content-Length: \x0bLENGTH\r\n"),
        hiding("a word", "Content-Length: all\r\n"),
        hiding("nothing", "Content-Length:\r\n"),
        hiding(
            "digits of another script",
            "Content-Length: \u{0663}\u{0663}\r\n",
        ),
        hiding("beyond 64 bits", "Content-Length: 18446744073709551649\r\n"),
        hiding(
            "beyond 64 bits, signed",
            "Content-Length: 9223372036854775808\r\n",
        )
        .incomplete(),
        hiding("blank before the colon", "Content-Length : LENGTH\r\n"),
        hiding(
            "a name that looks alike",
            "Content_Length: LENGTH\r\nContent-Length: LENGTH\r\n",
        ),
        hiding("leading zeros", "Content-Length: 000LENGTH\r\n"),
        content("shorter than said", b"Content-Length: 900\r\n", b"short").incomplete(),
        content("longer than said", b"Content-Length: 2\r\n", b"longer"),
        content(
            "without any framing",
            b"",
            b"GARBAGE without a length\r\n\r\n",
        ),
    ]
}

/// Transfer-Encoding: whoever takes the content for something else than chunks sees the hidden
/// request.
fn encodings() -> Vec<Case> {
    let chunked = [b"0\r\n\r\n", HIDDEN].concat();
    // Either way of reading it ends at the same place: with `/hidden` in the content, or after it.
    let smuggle = |name: &str, lines: &str| {
        let lines = lines.replace("LENGTH", &chunked.len().to_string());
        let mut case = content(name, lines.as_bytes(), &chunked);
        case.name = format!("encoding: {name}");
        case
    };
    let variants = [
        ("chunked", " chunked"),
        ("identity", " identity"),
        ("chunked and identity", " chunked, identity"),
        ("identity and chunked", " identity, chunked"),
        ("chunked twice", " chunked, chunked"),
        ("xchunked", " xchunked"),
        ("chunkedx", " chunkedx"),
        ("chunked with a parameter", " chunked;q=1"),
        ("chunked in quotes", " \"chunked\""),
        ("CHUNKED", " CHUNKED"),
        ("a tab before it", "\tchunked"),
        ("a vertical tab before it", " \x0bchunked"),
        ("a form feed after it", " chunked\x0c"),
        ("NUL after it", " chunked\0"),
        ("a comma before it", " ,chunked"),
        ("a comma after it", " chunked,"),
        ("a blank within", " chun ked"),
        ("gzip", " gzip"),
        ("gzip and chunked", " gzip, chunked"),
        ("nothing", ""),
        ("folded", "\r\n chunked"),
        ("a bare CR before it", " \rchunked"),
        ("a bare LF before it", "\nchunked"),
    ];
    let beside = variants.map(|(name, value)| {
        let lines = format!("Content-Length: LENGTH\r\nTransfer-Encoding:{value}\r\n");
        smuggle(&format!("{name}, beside a length"), &lines)
    });
    let alone = variants.map(|(name, value)| {
        let lines = format!("Transfer-Encoding:{value}\r\n");
        let mut case = content(name, lines.as_bytes(), b"3\r\nabc\r\n0\r\n\r\n");
        case.name = format!("encoding: {name}");
        case
    });
    let others = [
        smuggle(
            "chunked before a length",
            "Transfer-Encoding: chunked\r\nContent-Length: LENGTH\r\n",
        ),
        smuggle(
            "two fields",
            "Content-Length: LENGTH\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        ),
        smuggle(
            "two fields the other way round",
            "Content-Length: LENGTH\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        ),
        smuggle(
            "a blank before the colon",
            "Content-Length: LENGTH\r\nTransfer-Encoding : chunked\r\n",
        ),
        smuggle(
            "a name that looks alike",
            "Content-Length: LENGTH\r\nTransfer_Encoding: chunked\r\n",
        ),
        smuggle(
            "NUL in the name",
            "Content-Length: LENGTH\r\nTransfer\0-Encoding: chunked\r\n",
        ),
        smuggle(
            "a blank before the name",
            "Content-Length: LENGTH\r\n Transfer-Encoding: chunked\r\n",
        ),
        smuggle(
            "hidden behind a bare LF",
            "Content-Length: LENGTH\r\nX-A: a\nTransfer-Encoding: chunked\r\n",
        ),
        smuggle(
            "hidden behind a bare CR",
            "Content-Length: LENGTH\r\nX-A: a\rTransfer-Encoding: chunked\r\n",
        ),
        smuggle("only gzip, without a length", "Transfer-Encoding: gzip\r\n"),
        case(
            "encoding: chunked in HTTP/1.0",
            [
                b"POST /own HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
                &chunked[..],
            ]
            .concat(),
        ),
        case(
            "encoding: chunked beside a length in HTTP/1.0",
            [
                b"POST /own HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\
                  Content-Length: 38\r\nTransfer-Encoding: chunked\r\n\r\n",
                &chunked[..],
            ]
            .concat(),
        ),
        case(
            "encoding: chunked for GET, with a hidden request after it",
            [
                b"GET /own HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n21\r\n",
                HIDDEN,
                b"\r\n0\r\n\r\n",
            ]
            .concat(),
        ),
    ];
    beside.into_iter().chain(alone).chain(others).collect()
}

fn chunked() -> Vec<Case> {
    vec![
        chunks("no size", b"\r\nabc\r\n0\r\n\r\n"),
        chunks("a minus", b"-3\r\nabc\r\n0\r\n\r\n"),
        chunks("a plus", b"+3\r\nabc\r\n0\r\n\r\n"),
        chunks("0x", b"0x3\r\nabc\r\n0\r\n\r\n"),
        chunks("a word", b"three\r\nabc\r\n0\r\n\r\n"),
        chunks("a blank before", b" 3\r\nabc\r\n0\r\n\r\n"),
        chunks("a blank after", b"3 \r\nabc\r\n0\r\n\r\n"),
        chunks("a tab after", b"3\t\r\nabc\r\n0\r\n\r\n"),
        chunks("a letter after", b"3g\r\nabc\r\n0\r\n\r\n"),
        chunks("NUL after", b"3\0\r\nabc\r\n0\r\n\r\n"),
        chunks("an underscore", b"0_3\r\nabc\r\n0\r\n\r\n"),
        chunks("17 digits", b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
        chunks("16 digits", b"ffffffffffffffff\r\nabc\r\n0\r\n\r\n").incomplete(),
        chunks(
            "100 zeros before",
            &[&[b'0'; 100][..], b"3\r\nabc\r\n0\r\n\r\n"].concat(),
        ),
        chunks("bare LF after the size", b"3\nabc\r\n0\r\n\r\n"),
        chunks("bare CR after the size", b"3\rabc\r\n0\r\n\r\n"),
        chunks("nothing after the data", b"3\r\nabc0\r\n\r\n"),
        chunks("bare LF after the data", b"3\r\nabc\n0\r\n\r\n"),
        chunks("data longer than said", b"3\r\nabcdef\r\n0\r\n\r\n"),
        chunks("data shorter than said", b"9\r\nabc\r\n0\r\n\r\n").incomplete(),
        chunks("bare LF at the end", b"3\r\nabc\r\n0\n\n"),
        chunks("bare LF after the last size", b"3\r\nabc\r\n0\n\r\n"),
        chunks("bare LF as the last line", b"3\r\nabc\r\n0\r\n\n"),
        chunks("no end", b"3\r\nabc\r\n").incomplete(),
        chunks("an extension", b"3;a=b\r\nabc\r\n0\r\n\r\n"),
        chunks(
            "an extension in quotes",
            b"3;a=\"b\\\"c\"\r\nabc\r\n0;x\r\n\r\n",
        ),
        chunks("NUL in an extension", b"3;a\0\r\nabc\r\n0\r\n\r\n"),
        chunks("bare CR in an extension", b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
        chunks("bare LF in an extension", b"3;a\nb\r\nabc\r\n0\r\n\r\n"),
        chunks(
            "a hidden request behind a bare LF in an extension",
            b"3;\nxx\r\n2c\r\n0\r\n\r\nGET /hidden HTTP/1.1\r\nHost: h\r\n\r\n",
        ),
        chunks(
            "an extension of 70,000 bytes",
            &[b"3;", &[b'a'; 70_000][..], b"\r\nabc\r\n0\r\n\r\n"].concat(),
        ),
        chunks("a comma", b"3,a\r\nabc\r\n0\r\n\r\n"),
        chunks("trailers", b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"),
        chunks(
            "a length as trailer",
            b"3\r\nabc\r\n0\r\nContent-Length: 9\r\n\r\n",
        ),
        chunks(
            "an encoding as trailer",
            b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        chunks("Host as trailer", b"3\r\nabc\r\n0\r\nHost: other\r\n\r\n"),
        chunks(
            "a trailer without a colon",
            b"3\r\nabc\r\n0\r\nX-Sum\r\n\r\n",
        ),
        chunks(
            "a trailer with a blank before its colon",
            b"3\r\nabc\r\n0\r\nX-Sum : 1\r\n\r\n",
        ),
        chunks("NUL in a trailer", b"3\r\nabc\r\n0\r\nX-Sum: \0\r\n\r\n"),
        chunks(
            "a folded trailer",
            b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n 2\r\n\r\n",
        ),
        chunks(
            "bare LF in a trailer",
            b"3\r\nabc\r\n0\r\nX-Sum: 1\nX-B: 2\r\n\r\n",
        ),
        chunks(
            "trailers of 70,000 bytes",
            &[b"0\r\nX-A: ", &[b'a'; 70_000][..], b"\r\n\r\n"].concat(),
        ),
        chunks(
            "a request as trailers",
            b"0\r\nGET /hidden HTTP/1.1\r\nHost: h\r\n\r\n",
        ),
    ]
}

fn connections() -> Vec<Case> {
    vec![
        field("Connection names Host", b"Connection: host\r\n"),
        field(
            "Connection names Content-Length",
            b"Connection: content-length\r\nContent-Length: 0\r\n",
        ),
        content(
            "Connection names Content-Length, with content",
            b"Connection: keep-alive, content-length\r\nContent-Length: 33\r\n",
            HIDDEN,
        ),
        content(
            "Connection names Transfer-Encoding",
            b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n",
            &[b"21\r\n", HIDDEN, b"\r\n0\r\n\r\n"].concat(),
        ),
        field("Connection with bad words", b"Connection: a b;c=\"d\r\n"),
        field("Connection of commas", b"Connection: ,,,,\r\n"),
        field(
            "Connection closes and keeps",
            b"Connection: close, keep-alive\r\n",
        ),
        field(
            "an upgrade to nothing",
            b"Connection: upgrade\r\nUpgrade:\r\n",
        ),
        field(
            "an upgrade to a false word",
            b"Connection: upgrade\r\nUpgrade: a b(\r\n",
        ),
        field(
            "an upgrade that Connection doesn't name",
            b"Upgrade: websocket\r\n",
        ),
        field(
            "an upgrade to h2c",
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        ),
        field("HTTP2-Settings alone", b"HTTP2-Settings: AAMAAABk\r\n"),
        field("an unknown Expect", b"Expect: 200-maybe\r\n"),
        field(
            "Expect twice",
            b"Expect: 100-continue\r\nExpect: 100-continue\r\n",
        ),
        content(
            "Expect without content",
            b"Expect: 100-continue\r\nContent-Length: 0\r\n",
            b"",
        ),
        field("Keep-Alive nonsense", b"Keep-Alive: \"\r\n"),
        field(
            "TE nonsense",
            b"TE: trailers;q=x, chunked\r\nConnection: TE\r\n",
        ),
        field("Max-Forwards nonsense", b"Max-Forwards: -1\r\n"),
        field(
            "X-Forwarded-For nonsense",
            b"X-Forwarded-For: \"<script>\", ,,\r\n",
        ),
        field(
            "Proxy",
            b"Proxy: http://evil.test\r\nProxy-Connection: keep-alive\r\n",
        ),
    ]
}

fn other_protocols() -> Vec<Case> {
    let hello = b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03";
    vec![
        case("other: TLS", [&hello[..], &[7; 36]].concat()),
        case("other: SSLv2", b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x01\x00\x80\x02\x00\x80\r\n\r\n"),
        case("other: SSH", b"SSH-2.0-OpenSSH_9.2\r\n"),
        case("other: SMTP", b"EHLO h\r\nMAIL FROM:<a@h>\r\n"),
        case("other: RTSP", b"OPTIONS rtsp://h/own RTSP/1.0\r\nCSeq: 1\r\n\r\n"),
        case("other: SIP", b"OPTIONS sip:a@h SIP/2.0\r\nMax-Forwards: 70\r\n\r\n"),
        case("other: PROXY protocol 1", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /own HTTP/1.1\r\nHost: h\r\n\r\n"),
        case(
            "other: PROXY protocol 2",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\0\x01\0\x02GET /own HTTP/1.1\r\nHost: h\r\n\r\n",
        ),
        case("other: redis", b"*1\r\n$4\r\nPING\r\n"),
        case("other: JSON", b"{\"jsonrpc\":\"2.0\",\"method\":\"own\"}\r\n\r\n"),
        case("other: half of HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"),
        case("other: zeros", [0; 300]),
        case("other: ones", [0xff; 300]),
        case("other: an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        case("other: a command", b"/bin/sh -i\r\n\r\n"),
    ]
}
