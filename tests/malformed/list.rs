//! The requests, byte by byte.

/// A request, or what somebody sends in its place.
pub(crate) struct Case {
    pub(crate) group: &'static str,
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// How many requests these bytes are to a strict reader, at most.
    pub(crate) requests: usize,
    /// The bytes break off: the visitor sends no more.
    pub(crate) leaves: bool,
}

impl Case {
    /// The bytes, as far as they are worth looking at.
    pub(crate) fn shown(&self) -> String {
        let bytes = &self.bytes[..self.bytes.len().min(400)];
        bytes.escape_ascii().to_string()
    }

    fn requests(&mut self, count: usize) -> &mut Self {
        self.requests = count;
        self
    }

    fn leaves(&mut self) -> &mut Self {
        self.leaves = true;
        self
    }
}

/// All of them.
pub(crate) fn list() -> Vec<Case> {
    let mut list = List {
        group: "",
        cases: Vec::new(),
    };
    request_lines(&mut list);
    targets(&mut list);
    header_lines(&mut list);
    hosts(&mut list);
    lengths(&mut list);
    codings(&mut list);
    chunks(&mut list);
    trailers(&mut list);
    connections(&mut list);
    others(&mut list);
    list.cases
}

struct List {
    group: &'static str,
    cases: Vec<Case>,
}

impl List {
    fn raw(&mut self, name: &'static str, bytes: impl Into<Vec<u8>>) -> &mut Case {
        self.cases.push(Case {
            group: self.group,
            name,
            bytes: bytes.into(),
            requests: 1,
            leaves: false,
        });
        self.cases.last_mut().unwrap()
    }

    /// A request line in a request without a body.
    fn line(&mut self, name: &'static str, line: impl AsRef<[u8]>) -> &mut Case {
        self.raw(name, [line.as_ref(), b"\r\nHost: h\r\n\r\n"].concat())
    }

    /// Header lines, each with its end, in a request without a body.
    fn lines(&mut self, name: &'static str, lines: impl AsRef<[u8]>) -> &mut Case {
        let head: &[u8] = b"GET / HTTP/1.1\r\nHost: h\r\n";
        self.raw(name, [head, lines.as_ref(), b"\r\n"].concat())
    }

    /// The lines that say how long the body is, each with its end, and the body.
    fn body(
        &mut self,
        name: &'static str,
        lines: impl AsRef<[u8]>,
        body: impl AsRef<[u8]>,
    ) -> &mut Case {
        let head: &[u8] = b"POST / HTTP/1.1\r\nHost: h\r\n";
        self.raw(
            name,
            [head, lines.as_ref(), b"\r\n", body.as_ref()].concat(),
        )
    }

    /// A body in chunks, raw.
    fn chunked(&mut self, name: &'static str, body: impl AsRef<[u8]>) -> &mut Case {
        self.body(name, "Transfer-Encoding: chunked\r\n", body)
    }
}

/// What a smuggler wants the service to take for a request of its own.
const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: h\r\n\r\n";

fn request_lines(list: &mut List) {
    list.group = "request line";
    list.line("two words", "GET /");
    list.line("one word", "GET");
    list.line("four words", "GET / HTTP/1.1 x");
    list.line("a space at the end", "GET / HTTP/1.1 ");
    list.line("a tab at the end", "GET / HTTP/1.1\t");
    list.line("a space at the beginning", " GET / HTTP/1.1");
    list.line("two spaces before the target", "GET  / HTTP/1.1");
    list.line("two spaces before the version", "GET /  HTTP/1.1");
    list.line("a tab for a space", "GET\t/ HTTP/1.1");
    list.line("a vertical tab for a space", "GET\x0b/ HTTP/1.1");
    list.line("a form feed before the version", "GET /\x0cHTTP/1.1");
    list.line("no target", "GET HTTP/1.1");
    list.line("an empty target", "GET  HTTP/1.1");
    list.line("an empty line first", "\r\nGET / HTTP/1.1");
    list.line("a bare LF first", "\nGET / HTTP/1.1");
    list.line("a bare CR first", "\rGET / HTTP/1.1");
    list.line(
        "a hundred empty lines first",
        "\r\n".repeat(100) + "GET / HTTP/1.1",
    );
    list.line("a NUL first", "\0GET / HTTP/1.1");
    list.line("a byte order mark first", "\u{feff}GET / HTTP/1.1");
    list.raw("a bare LF at the end", "GET / HTTP/1.1\nHost: h\r\n\r\n");
    list.raw("bare LFs everywhere", "GET / HTTP/1.1\nHost: h\n\n");
    list.raw("a bare CR at the end", "GET / HTTP/1.1\rHost: h\r\n\r\n");
    list.raw("two CRs at the end", "GET / HTTP/1.1\r\r\nHost: h\r\n\r\n");
    list.raw("bare CRs everywhere", "GET / HTTP/1.1\rHost: h\r\r")
        .leaves();
    list.line("a NUL in the method", "GE\0T / HTTP/1.1");
    list.line("a method in lower case", "get / HTTP/1.1");
    list.line("a method nobody knows", "BREW / HTTP/1.1");
    list.line(
        "a method of odd but allowed bytes",
        "M!#$%&'*+-.^_`|~9 / HTTP/1.1",
    );
    list.line("a method with a parenthesis", "G(T / HTTP/1.1");
    list.line("a method with a colon", "GET: / HTTP/1.1");
    list.line("a method with a byte above 127", b"G\xc9T / HTTP/1.1");
    list.line(
        "a method of 1,000 letters",
        "G".repeat(1000) + " / HTTP/1.1",
    );
    list.line("a version in lower case", "GET / http/1.1");
    list.line("HTTP/0.9 with a version", "GET / HTTP/0.9");
    list.line("HTTP/1.2", "GET / HTTP/1.2");
    list.line("HTTP/1.10", "GET / HTTP/1.10");
    list.line("HTTP/1.01", "GET / HTTP/1.01");
    list.line("HTTP/01.1", "GET / HTTP/01.1");
    list.line("HTTP/2.0", "GET / HTTP/2.0");
    list.line("HTTP/3", "GET / HTTP/3");
    list.line("HTTP/1", "GET / HTTP/1");
    list.line("HTTP/1.", "GET / HTTP/1.");
    list.line("HTTP/1,1", "GET / HTTP/1,1");
    list.line("HTTP/-1.1", "GET / HTTP/-1.1");
    list.line("HTTP/99999999999.1", "GET / HTTP/99999999999.1");
    list.line("a version without its name", "GET / 1.1");
    list.line("another protocol", "GET / ICY/1.1");
    list.line("a blank in the version", "GET / HTTP /1.1");
    list.raw("HTTP/0.9", "GET /\r\n").leaves();
    list.raw(
        "a request line of HTTP/1.0, no more",
        "GET / HTTP/1.0\r\n\r\n",
    );
    let long = "x".repeat(9 * 1024);
    list.line("a target of 9 KiB", format!("GET /{long} HTTP/1.1"));
    let long = "x".repeat(100 * 1024);
    list.line("a target of 100 KiB", format!("GET /{long} HTTP/1.1"));
    list.raw("100 KiB without a line's end", long).leaves();
}

fn targets(list: &mut List) {
    list.group = "target";
    list.line("no slash first", "GET x HTTP/1.1");
    list.line("a query only", "GET ?x HTTP/1.1");
    list.line("a backslash first", "GET \\x HTTP/1.1");
    list.line("a space within", "GET /a b HTTP/1.1");
    list.line("a NUL within", "GET /a\0b HTTP/1.1");
    list.line("a tab within", "GET /a\tb HTTP/1.1");
    list.line("a DEL within", "GET /a\x7fb HTTP/1.1");
    list.line("a bare CR within", "GET /a\rb HTTP/1.1");
    list.line("a bare LF within", "GET /a\nb HTTP/1.1");
    list.line("an escape character within", "GET /a\x1bb HTTP/1.1");
    list.line("bytes above 127", b"GET /caf\xe9 HTTP/1.1");
    list.line("UTF-8", "GET /caf\u{e9} HTTP/1.1");
    list.line("a fragment", "GET /a#b HTTP/1.1");
    list.line("a fragment only", "GET #b HTTP/1.1");
    list.line("escapes that are none", "GET /%zz%1% HTTP/1.1");
    list.line("an escaped NUL", "GET /a%00b HTTP/1.1");
    list.line("an escaped CR LF", "GET /a%0d%0aX:%20y HTTP/1.1");
    list.line("out of the root", "GET /../../etc/passwd HTTP/1.1");
    list.line("out of the root, escaped", "GET /%2e%2e%2fetc HTTP/1.1");
    list.line("two slashes first", "GET //other/x HTTP/1.1");
    list.line("an asterisk with GET", "GET * HTTP/1.1");
    list.line("an asterisk and a path", "OPTIONS */x HTTP/1.1");
    list.line("an authority with GET", "GET h:80 HTTP/1.1");
    list.line("an absolute one that is Host's", "GET http://h/x HTTP/1.1");
    list.line("an absolute one without a path", "GET http://h HTTP/1.1");
    list.line(
        "an absolute one of another host",
        "GET http://other/x HTTP/1.1",
    );
    list.line("an absolute one with a user", "GET http://u:p@h/x HTTP/1.1");
    list.line("an absolute one without a host", "GET http:///x HTTP/1.1");
    list.line(
        "an absolute one with a port that is none",
        "GET http://h:x/ HTTP/1.1",
    );
    list.line(
        "an absolute one of another scheme",
        "GET ftp://h/x HTTP/1.1",
    );
    list.line("an absolute one with https", "GET https://h/x HTTP/1.1");
    list.line("a scheme without slashes", "GET http:x HTTP/1.1");
    list.line("a script for a scheme", "GET javascript:alert(1) HTTP/1.1");
    list.line("a file", "GET file:///etc/passwd HTTP/1.1");
}

fn header_lines(list: &mut List) {
    list.group = "header line";
    list.lines("no colon", "Broken\r\n");
    list.lines("a colon only", ":\r\n");
    list.lines("an empty name", ": x\r\n");
    list.lines("a space before the colon", "X : y\r\n");
    list.lines("a tab before the colon", "X\t: y\r\n");
    list.lines("a space in the name", "X Y: z\r\n");
    list.lines("a NUL in the name", "X\0Y: z\r\n");
    list.lines("a control byte in the name", "X\x01Y: z\r\n");
    list.lines("a parenthesis in the name", "X(Y): z\r\n");
    list.lines("a slash in the name", "X/Y: z\r\n");
    list.lines("quotes around the name", "\"X\": z\r\n");
    list.lines("a byte above 127 in the name", b"X\xe9: z\r\n");
    list.lines("an underscore in the name", "X_Y: z\r\n");
    list.lines("a bare CR in the name", "X\rY: z\r\n");
    list.lines("a bare CR before the colon", "X\r: z\r\n");
    list.lines("a folded line", "X: y\r\n z\r\n");
    list.lines("a folded line, by a tab", "X: y\r\n\tz\r\n");
    list.lines("a folded line that is blank", "X: y\r\n \r\n");
    list.lines(
        "a fold that hides a header",
        "X: y\r\n Transfer-Encoding: chunked\r\n",
    );
    let first = "GET / HTTP/1.1\r\n";
    list.raw(
        "a blank before the first name",
        format!("{first} Host: h\r\n\r\n"),
    );
    list.raw(
        "a line of blanks first",
        format!("{first}  \r\nHost: h\r\n\r\n"),
    );
    list.lines("a NUL in the value", "X: y\0z\r\n");
    list.lines("a NUL at the value's end", "X: y\0\r\n");
    list.lines("a bare CR in the value", "X: y\rz\r\n");
    list.lines(
        "a bare CR that hides a header",
        "X: y\rTransfer-Encoding: chunked\r\n",
    );
    list.lines("two CRs at the end", "X: y\r\r\n");
    list.lines("a bare LF at the end", "X: y\n");
    list.lines("a bare LF that hides a header", "X: y\nX-Z: 1\r\n");
    list.lines("a bell in the value", "X: y\x07z\r\n");
    list.lines("an escape character in the value", "X: \x1b[2J\r\n");
    list.lines("a DEL in the value", "X: y\x7fz\r\n");
    list.lines("a vertical tab in the value", "X: y\x0bz\r\n");
    list.lines("a form feed in the value", "X: y\x0cz\r\n");
    list.lines("bytes above 127 in the value", b"X: caf\xe9 \xff\x80\r\n");
    list.lines("an empty value", "X:\r\n");
    list.lines("a value of blanks", "X: \t \r\n");
    list.lines("101 lines", "X: y\r\n".repeat(101));
    list.lines("10,000 lines", "X: y\r\n".repeat(10_000));
    list.lines(
        "a value of 70 KiB",
        format!("X: {}\r\n", "y".repeat(70 * 1024)),
    );
    list.lines(
        "a name of 70 KiB",
        format!("{}: y\r\n", "X".repeat(70 * 1024)),
    );
    let status = "HTTP/1.1 200 OK\r\n";
    list.lines("a status line among the lines", status);
    list.lines("a request line among the lines", "GET /hidden HTTP/1.1\r\n");
    list.raw("a line that breaks off", format!("{first}Host: h\r\nX"))
        .leaves();
    list.raw("an end of LF CR", format!("{first}Host: h\r\n\n\r"))
        .leaves();
    list.raw("an end of CR CR LF", format!("{first}Host: h\r\n\r\r\n"))
        .leaves();
    list.raw("no end", format!("{first}Host: h\r\n")).leaves();
}

fn hosts(list: &mut List) {
    list.group = "Host";
    let with = |lines: &str| format!("GET / HTTP/1.1\r\n{lines}\r\n");
    list.raw("none", with(""));
    list.raw("none in HTTP/1.0", "GET / HTTP/1.0\r\nX: y\r\n\r\n");
    list.raw("empty", with("Host:\r\n"));
    list.raw("two that are equal", with("Host: h\r\nHost: h\r\n"));
    list.raw("two that differ", with("Host: h\r\nHost: other\r\n"));
    list.raw(
        "two, one in HTTP/1.0's case",
        "GET / HTTP/1.0\r\nHost: h\r\nhOST: i\r\n\r\n",
    );
    list.raw(
        "a second with a space before the colon",
        with("Host: h\r\nHost : i\r\n"),
    );
    list.raw("a second by a fold", with("Host: h\r\n Host: i\r\n"));
    list.raw("a list", with("Host: h, other\r\n"));
    list.raw("a blank within", with("Host: h other\r\n"));
    list.raw("a path", with("Host: h/x\r\n"));
    list.raw("a query", with("Host: h?x\r\n"));
    list.raw("a fragment in Host", with("Host: h#x\r\n"));
    list.raw("a user", with("Host: u@h\r\n"));
    list.raw("a scheme", with("Host: http://h\r\n"));
    list.raw("a port that is none", with("Host: h:x\r\n"));
    list.raw("a port with a sign", with("Host: h:+80\r\n"));
    list.raw("a port beyond 65535", with("Host: h:99999\r\n"));
    list.raw("two ports", with("Host: h:80:81\r\n"));
    list.raw("a colon and no port", with("Host: h:\r\n"));
    list.raw("a port only", with("Host: :80\r\n"));
    list.raw("an IPv6 address without brackets", with("Host: ::1\r\n"));
    list.raw("a bracket that stays open", with("Host: [::1\r\n"));
    list.raw("a backslash in Host", with("Host: h\\x\r\n"));
    list.raw("a quote", with("Host: h\"x\r\n"));
    list.raw("angle brackets", with("Host: <script>\r\n"));
    list.raw("a tab in Host", with("Host: h\tx\r\n"));
    list.raw("a NUL in Host", with("Host: h\0\r\n"));
    list.raw("a bare CR in Host", with("Host: h\rX: y\r\n"));
    list.raw("UTF-8 in Host", with("Host: caf\u{e9}\r\n"));
}

fn lengths(list: &mut List) {
    list.group = "Content-Length";
    for (name, value) in [
        ("empty length", ""),
        ("a plus sign", "+5"),
        ("a minus sign", "-5"),
        ("minus zero", "-0"),
        ("hexadecimal", "0x5"),
        ("a fraction", "5.0"),
        ("an exponent", "5e0"),
        ("an underscore", "0_5"),
        ("letters", "five"),
        ("a letter behind", "5a"),
        ("a blank within a length", "0 5"),
        ("quotes", "\"5\""),
        ("a semicolon behind", "5;"),
        ("a comma behind", "5,"),
        ("a list of equals", "5, 5"),
        ("a list of others", "5, 6"),
        ("2 to the 63rd", "9223372036854775808"),
        ("2 to the 64th and 5", "18446744073709551621"),
        ("forty nines", "9999999999999999999999999999999999999999"),
        ("other digits", "\u{665}"),
        ("a NUL behind", "5\0"),
        ("a vertical tab behind", "5\x0b"),
    ] {
        list.body(name, format!("Content-Length: {value}\r\n"), "hello");
    }
    list.body(
        "leading zeros",
        "Content-Length: 0000000000000000000000005\r\n",
        "hello",
    );
    list.body("blanks around", "Content-Length: \t 5 \t\r\n", "hello");
    list.body(
        "two that are equal lengths",
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "hello",
    );
    list.body(
        "two that differ in length",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "hello!",
    );
    let hidden = HIDDEN.len();
    let two = format!("Content-Length: 0\r\nContent-Length: {hidden}\r\n");
    list.body("two, the first of zero", two, HIDDEN);
    let two = format!("Content-Length: {hidden}\r\nContent-Length: 0\r\n");
    list.body("two, the second of zero", two, HIDDEN);
    list.body(
        "a length with a space before the colon",
        "Content-Length : 5\r\n",
        "hello",
    );
    list.body("a length by a fold", "Content-Length:\r\n 5\r\n", "hello");
    list.body("an underscore in its name", "Content_Length: 5\r\n", "");
    list.body(
        "a request hidden in the body",
        format!("Content-Length: {hidden}\r\n"),
        HIDDEN,
    );
    let get = "GET / HTTP/1.1\r\nHost: h\r\n";
    list.raw(
        "GET with a body",
        format!("{get}Content-Length: {hidden}\r\n\r\n{HIDDEN}"),
    );
    list.raw(
        "HEAD with a body",
        "HEAD / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
    );
    list.body("a body that is shorter", "Content-Length: 50\r\n", "hello")
        .leaves();
    list.body("no length, and a body", "", "hello");
    list.body(
        "a length of zero, and a request",
        "Content-Length: 0\r\n",
        HIDDEN,
    )
    .requests(2);
    list.body("POST without a length, and a request", "", HIDDEN)
        .requests(2);
}

fn codings(list: &mut List) {
    list.group = "Transfer-Encoding";
    const BODY: &str = "5\r\nhello\r\n0\r\n\r\n";
    for (name, value) in [
        ("an empty coding", ""),
        ("identity", "identity"),
        ("gzip", "gzip"),
        ("gzip, chunked", "gzip, chunked"),
        ("chunked, gzip", "chunked, gzip"),
        ("chunked, identity", "chunked, identity"),
        ("identity, chunked", "identity, chunked"),
        ("chunked, chunked", "chunked, chunked"),
        ("a comma before chunked", ", chunked"),
        ("a comma behind chunked", "chunked,"),
        ("xchunked", "xchunked"),
        ("chunkedx", "chunkedx"),
        ("chunk", "chunk"),
        ("CHUNKED", "CHUNKED"),
        ("quoted", "\"chunked\""),
        ("single quotes", "'chunked'"),
        ("a parameter", "chunked;q=1"),
        ("a semicolon behind chunked", "chunked;"),
        ("a tab before", "\tchunked"),
        ("a tab behind", "chunked\t"),
        ("a vertical tab before", "\x0bchunked"),
        ("a vertical tab behind chunked", "chunked\x0b"),
        ("a form feed behind", "chunked\x0c"),
        ("a NUL behind chunked", "chunked\0"),
        ("a blank within chunked", "chun ked"),
        ("a byte above 127", "chunked\u{a0}"),
        ("a bare CR behind", "chunked\rX: y"),
        ("a bare LF before", "\nX: chunked"),
        ("by a fold", "\r\n chunked"),
        ("a second behind a fold", "chunked\r\n , identity"),
    ] {
        list.body(name, format!("Transfer-Encoding: {value}\r\n"), BODY);
    }
    let te = "Transfer-Encoding: chunked\r\n";
    list.body("two lines of chunked", te.repeat(2), BODY);
    list.body(
        "two lines, identity first",
        format!("Transfer-Encoding: identity\r\n{te}"),
        BODY,
    );
    list.body(
        "two lines, identity second",
        format!("{te}Transfer-Encoding: identity\r\n"),
        BODY,
    );
    list.body(
        "two lines, x second",
        format!("{te}Transfer-encoding: x\r\n"),
        BODY,
    );
    list.body(
        "a space before its colon",
        "Transfer-Encoding : chunked\r\n",
        BODY,
    );
    list.body(
        "a tab before its colon",
        "Transfer-Encoding\t: chunked\r\n",
        BODY,
    );
    list.body(
        "a blank before its name",
        " Transfer-Encoding: chunked\r\n",
        BODY,
    );
    list.body(
        "an underscore for its hyphen",
        "Transfer_Encoding: chunked\r\n",
        "",
    );
    list.body(
        "a bare CR before its name",
        "X: y\r\rTransfer-Encoding: chunked\r\n",
        BODY,
    );
    list.body("a colon twice", "Transfer-Encoding:: chunked\r\n", BODY);
    list.body(
        "with a length, CL.TE",
        format!("Content-Length: 5\r\n{te}"),
        BODY,
    );
    list.body(
        "with a length, TE.CL",
        format!("{te}Content-Length: 5\r\n"),
        BODY,
    );
    let smuggled = format!("0\r\n\r\n{HIDDEN}");
    let length = format!("Content-Length: {}\r\n{te}", smuggled.len());
    list.body("CL.TE with a request behind", length, &smuggled);
    let chunk = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    list.body(
        "TE.CL with a request within",
        format!("{te}Content-Length: 4\r\n"),
        &chunk,
    );
    list.body(
        "with a length of zero",
        format!("Content-Length: 0\r\n{te}"),
        BODY,
    );
    list.body(
        "xchunked with a length",
        "Content-Length: 15\r\nTransfer-Encoding: xchunked\r\n",
        BODY,
    );
    list.body(
        "a length and a coding with a blank",
        "Content-Length: 15\r\nTransfer-Encoding : chunked\r\n",
        BODY,
    );
    let old = "POST / HTTP/1.0\r\nHost: h\r\n";
    list.raw("in HTTP/1.0", format!("{old}{te}\r\n{BODY}"));
    list.raw(
        "in HTTP/1.0, with a length",
        format!("{old}Content-Length: 15\r\n{te}\r\n{BODY}"),
    );
    list.raw(
        "in HTTP/1.0, kept alive",
        format!("{old}Connection: keep-alive\r\n{te}\r\n{BODY}"),
    );
    list.raw(
        "with GET",
        format!("GET / HTTP/1.1\r\nHost: h\r\n{te}\r\n{BODY}"),
    );
}

fn chunks(list: &mut List) {
    list.group = "chunks";
    for (name, line) in [
        ("no size", ""),
        ("a size of a blank", " "),
        ("a size with a minus", "-5"),
        ("a size with a plus", "+5"),
        ("a size with 0x", "0x5"),
        ("a size with a blank before", " 5"),
        ("a size with a tab before", "\t5"),
        ("a size with a blank behind", "5 "),
        ("a size with a blank within", "0 5"),
        ("a size with a letter behind", "5g"),
        ("a size with an underscore", "0_5"),
        ("a size with a dot", "5.0"),
        ("a size with a comma", "5,"),
        ("a size in quotes", "\"5\""),
        ("a size with a NUL", "5\0"),
        ("a size with a vertical tab", "5\x0b"),
        ("a size with a form feed", "5\x0c"),
        ("a size of other digits", "\u{665}"),
        ("a size of 2 to the 64th and 5", "10000000000000005"),
        ("a size of 2 to the 64th less 1", "ffffffffffffffff"),
        ("a size of 2 to the 63rd", "8000000000000000"),
        (
            "a size of 100 zeros and 5",
            "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000005",
        ),
        ("an extension", "5;a=b"),
        ("an extension without a name", "5;"),
        ("an extension in quotes", "5;a=\"b;c\""),
        ("an extension with a bare LF", "5;a\nb"),
        ("an extension with a bare CR", "5;a\rb"),
        ("an extension with a NUL", "5;a\0b"),
        ("an extension with a bell", "5;a\x07b"),
        ("an extension without a semicolon", "5 a=b"),
        ("an extension in quotes that stay open", "5;a=\"b"),
        ("an extension with a byte above 127", "5;a=\u{e9}"),
    ] {
        list.chunked(name, format!("{line}\r\nhello\r\n0\r\n\r\n"));
    }
    list.chunked(
        "a size of 2 to the 32nd and 5",
        "100000005\r\nhello\r\n0\r\n\r\n",
    )
    .leaves();
    let long = "x".repeat(20 * 1024);
    list.chunked(
        "an extension of 20 KiB",
        format!("5;{long}\r\nhello\r\n0\r\n\r\n"),
    );
    list.chunked("a size line by a bare LF", "5\nhello\r\n0\r\n\r\n");
    list.chunked("a size line by a bare CR", "5\rhello\r\n0\r\n\r\n");
    list.chunked("a chunk that ends with a bare LF", "5\r\nhello\n0\r\n\r\n");
    list.chunked("a chunk that ends with a bare CR", "5\r\nhello\r0\r\n\r\n");
    list.chunked("a chunk that ends with LF CR", "5\r\nhello\n\r0\r\n\r\n");
    list.chunked("a chunk without an end", "5\r\nhello0\r\n\r\n");
    list.chunked("a chunk that is longer", "5\r\nhello!\r\n0\r\n\r\n");
    list.chunked("a chunk that is shorter", "6\r\nhello\r\n0\r\n\r\n");
    list.chunked("an end of bare LFs", "5\r\nhello\r\n0\n\n");
    list.chunked(
        "an end of a bare LF behind the size",
        "5\r\nhello\r\n0\n\r\n",
    );
    list.chunked("an end with a bare LF last", "5\r\nhello\r\n0\r\n\n");
    list.chunked("an end with a bare CR", "5\r\nhello\r\n0\r\n\rX")
        .leaves();
    list.chunked("an end with a sign", "5\r\nhello\r\n-0\r\n\r\n");
    list.chunked("an end of many zeros", "5\r\nhello\r\n00000000\r\n\r\n");
    list.chunked("an end with an extension", "5\r\nhello\r\n0;a=b\r\n\r\n");
    list.chunked("no chunks, a plain text", "hello\r\n");
    list.chunked(
        "a bare LF that hides a request",
        format!("2;\nxx\r\n{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len()),
    );
    list.chunked(
        "a request within a chunk",
        format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len()),
    );
    list.chunked("a request behind the end", format!("0\r\n\r\n{HIDDEN}"))
        .requests(2);
    list.chunked("an end that never comes", "5\r\nhello\r\n")
        .leaves();
    list.chunked("a chunk that breaks off", "50\r\nhello")
        .leaves();
}

fn trailers(list: &mut List) {
    list.group = "trailers";
    for (name, lines) in [
        ("one", "X-Sum: 1\r\n"),
        ("Content-Length in a trailer", "Content-Length: 5\r\n"),
        (
            "Transfer-Encoding in a trailer",
            "Transfer-Encoding: chunked\r\n",
        ),
        ("Host in a trailer", "Host: other\r\n"),
        ("Connection in a trailer", "Connection: close\r\n"),
        (
            "Authorization in a trailer",
            "Authorization: Basic eDp5\r\n",
        ),
        ("Cookie in a trailer", "Cookie: a=b\r\n"),
        ("Content-Type in a trailer", "Content-Type: text/html\r\n"),
        ("Expect in a trailer", "Expect: 100-continue\r\n"),
        ("Upgrade in a trailer", "Upgrade: websocket\r\n"),
        (
            "X-Forwarded-For in a trailer",
            "X-Forwarded-For: 203.0.113.9\r\n",
        ),
        ("a trailer without a colon", "X-Sum\r\n"),
        ("a trailer with a space before the colon", "X-Sum : 1\r\n"),
        ("a trailer without a name", ": 1\r\n"),
        ("a trailer that is folded", "X-Sum: 1\r\n 2\r\n"),
        ("a trailer with a blank first", " X-Sum: 1\r\n"),
        ("a trailer with a NUL", "X-Sum: \0\r\n"),
        ("a trailer with a bare CR", "X-Sum: 1\rHost: other\r\n"),
        ("a trailer with a bare LF", "X-Sum: 1\nHost: other\r\n"),
        ("a trailer that ends with a bare LF", "X-Sum: 1\n"),
        (
            "a request for a trailer",
            "GET /hidden HTTP/1.1\r\nHost: other\r\n",
        ),
    ] {
        list.chunked(name, format!("5\r\nhello\r\n0\r\n{lines}\r\n"));
    }
    let many = "X: y\r\n".repeat(5000);
    list.chunked("5,000 trailers", format!("5\r\nhello\r\n0\r\n{many}\r\n"));
    let long = "y".repeat(100 * 1024);
    list.chunked(
        "a trailer of 100 KiB",
        format!("5\r\nhello\r\n0\r\nX: {long}\r\n\r\n"),
    );
}

fn connections(list: &mut List) {
    list.group = "Connection, Expect, Upgrade";
    for (name, lines) in [
        ("Connection names Host", "Connection: host\r\n"),
        (
            "Connection names Host and close",
            "Connection: close, host\r\n",
        ),
        (
            "Connection names X-Forwarded-For",
            "Connection: x-forwarded-for\r\n",
        ),
        ("Connection names itself", "Connection: connection\r\n"),
        ("Connection of commas", "Connection: ,,,\r\n"),
        ("Connection of what is no token", "Connection: (\r\n"),
        ("Connection both ways", "Connection: close, keep-alive\r\n"),
        ("Expect of nonsense", "Expect: nonsense\r\n"),
        ("Expect of two things", "Expect: 100-continue, nonsense\r\n"),
        ("Expect without a body", "Expect: 100-continue\r\n"),
        ("Expect that is empty", "Expect:\r\n"),
        ("Upgrade of nothing", "Connection: upgrade\r\nUpgrade:\r\n"),
        (
            "Upgrade of what is no token",
            "Connection: upgrade\r\nUpgrade: (/)\r\n",
        ),
        (
            "Upgrade to HTTP/2",
            "Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        ),
        (
            "Upgrade to HTTP/2, settings that are none",
            "Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: !\r\n",
        ),
        (
            "Upgrade to TLS",
            "Connection: upgrade\r\nUpgrade: TLS/1.0\r\n",
        ),
        ("Upgrade without Connection", "Upgrade: websocket\r\n"),
        (
            "Upgrade that is refused",
            "Connection: upgrade\r\nUpgrade: websocket\r\n",
        ),
        ("Max-Forwards of nonsense", "Max-Forwards: -1\r\n"),
        ("TE of chunked", "Connection: te\r\nTE: chunked\r\n"),
        (
            "Trailer names Content-Length",
            "Trailer: content-length\r\n",
        ),
        ("Proxy-Connection", "Proxy-Connection: keep-alive\r\n"),
        (
            "Keep-Alive of nonsense",
            "Connection: keep-alive\r\nKeep-Alive: timeout=-1\r\n",
        ),
        (
            "X-Forwarded-For of nonsense",
            "X-Forwarded-For: \"<script>\r\n",
        ),
    ] {
        list.lines(name, lines);
    }
    list.body(
        "Connection names Content-Length",
        "Connection: content-length\r\nContent-Length: 5\r\n",
        "hello",
    );
    let te = "Transfer-Encoding: chunked\r\n";
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    list.body(
        "Connection names Transfer-Encoding",
        format!("Connection: transfer-encoding\r\n{te}"),
        chunks,
    );
    list.body(
        "Upgrade with a body",
        "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n",
        "hello",
    );
    list.lines(
        "Upgrade and a request behind",
        "Connection: upgrade\r\nUpgrade: websocket\r\n\r\nGET /second HTTP/1.1\r\nHost: h\r\n",
    )
    .requests(2);
    list.raw(
        "Upgrade in HTTP/1.0",
        "GET / HTTP/1.0\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    list.raw(
        "Expect in HTTP/1.0",
        "POST / HTTP/1.0\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    );
    list.raw(
        "close, and a request behind",
        format!("GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n{HIDDEN}"),
    );
    list.raw(
        "HTTP/1.0, and a request behind",
        format!("GET / HTTP/1.0\r\nHost: h\r\n\r\n{HIDDEN}"),
    );
}

fn others(list: &mut List) {
    list.group = "others";
    list.line("CONNECT of an authority", "CONNECT h:443 HTTP/1.1");
    list.line("CONNECT of a path", "CONNECT /x HTTP/1.1");
    list.line("CONNECT of an absolute one", "CONNECT http://h/ HTTP/1.1");
    list.raw(
        "CONNECT and a request behind",
        format!("CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n{HIDDEN}"),
    );
    list.line("TRACE", "TRACE / HTTP/1.1");
    list.raw(
        "TRACE with a body",
        "TRACE / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
    );
    list.line("PRI", "PRI * HTTP/1.1");
    list.raw("half of HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\n")
        .leaves();
    list.raw(
        "HTTP/2's preface with another end",
        "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    );
    list.raw(
        "HTTP/2's preface with Host",
        "PRI * HTTP/2.0\r\nHost: h\r\n\r\nSM\r\n\r\n",
    );
    list.raw(
        "TLS",
        b"\x16\x03\x01\x00\xf8\x01\x00\x00\xf4\x03\x03".repeat(20),
    );
    list.raw("SSH", "SSH-2.0-OpenSSH_9.2\r\n");
    list.raw("mail", "EHLO example.com\r\nMAIL FROM:<a@example.com>\r\n");
    list.raw(
        "the PROXY protocol",
        format!("PROXY TCP4 203.0.113.9 203.0.113.1 1 2\r\n{HIDDEN}"),
    );
    list.raw("an answer", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    list.raw("bytes above 127 only", b"\xff".repeat(300));
    list.raw("NULs", b"\0".repeat(300));
    list.raw("blanks", " ".repeat(300) + "\r\n\r\n");
    list.raw("empty lines, and nothing else", "\r\n".repeat(20))
        .leaves();
    list.raw("nothing", "").leaves();
    let good = "GET /first HTTP/1.1\r\nHost: h\r\n\r\n";
    list.raw("a good one, then junk", format!("{good}junk\r\n\r\n"));
    list.raw(
        "a good one, then two Hosts",
        format!("{good}GET /hidden HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n"),
    );
    list.raw(
        "a good one, then a bad length",
        format!("{good}POST /hidden HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n"),
    );
    list.raw("a good one, then NULs", format!("{good}\0\0\0\0\r\n\r\n"));
    list.raw(
        "a good one, then three in bad order",
        format!("{good}Host: h\r\nGET /hidden HTTP/1.1\r\n\r\n"),
    );
    list.raw("ten good ones, then junk", good.repeat(10) + "junk\r\n\r\n")
        .requests(10);
}
