//! The one place that knows the YAML library: text in, a tree with line numbers out.
//!
//! Scalars keep the text they were written with, so that an id `007` or a token `0x1f` stays
//! what it is; their meaning is the table's business. The library tells what a node is or what
//! its text was, but not both, so a document is read twice: once for the shapes, once for the
//! text. Where a scalar stands follows from the slice of the input that it borrows.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IgnoredAny, MapAccess, SeqAccess,
    Visitor,
};

/// The longest document, in bytes: room for some ten thousand agents with a token each.
pub(super) const MAX_LEN: usize = 1 << 20;

/// The most flow lists and mappings (`[` and `{`). The library's scanner looks at every open one
/// for each token, so that a document full of them would take minutes.
const MAX_FLOWS: usize = 256;

/// The most nodes that are read. A configuration has a few for each agent with a token; aliases
/// can multiply the nodes of a small file.
const MAX_NODES: usize = 200_000;

/// A part of a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// Where it begins; a list, a mapping and a text that is no plain slice of the document
    /// bear the position of their key.
    pub(super) at: Position,
    pub(super) value: Value,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Nothing at all, `~` or `null`.
    Null,
    /// Any scalar, as it was written, without its quotes.
    Text(String),
    List(Vec<Node>),
    /// In the order of the document; a key that stands twice is here twice.
    Map(Vec<Entry>),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) at: Position,
    pub(super) key: String,
    pub(super) node: Node,
}

/// A line and a column, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Position {
    pub(super) const START: Self = Self { line: 1, column: 1 };
}

/// Why a document can't be read, and where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub(super) at: Position,
    pub(super) text: String,
}

/// Reads one document. An empty one is [`Value::Null`].
pub(super) fn parse(document: &str) -> Result<Node, SyntaxError> {
    let too_much = |text: String| SyntaxError {
        at: Position::START,
        text,
    };
    if document.len() > MAX_LEN {
        return Err(too_much(format!("longer than {MAX_LEN} bytes")));
    }
    if flows(document) > MAX_FLOWS {
        return Err(too_much(format!("more than {MAX_FLOWS} of `[` and `{{`")));
    }
    let mut shapes = Vec::new();
    let reader = serde_yaml::Deserializer::from_str(document);
    Shapes(&mut shapes).deserialize(reader).map_err(explain)?;

    let mut source = Source {
        document,
        lines: line_starts(document),
        shapes: shapes.into_iter(),
    };
    let reader = serde_yaml::Deserializer::from_str(document);
    let here = Position::START;
    Texts(&mut source, here)
        .deserialize(reader)
        .map_err(explain)
}

/// At least as many flow lists and mappings as `document` can open: `[` and `{` where a value may
/// begin. Brackets inside a word or after a quote are text.
fn flows(document: &str) -> usize {
    let mut before = b'\n';
    let opens = |byte: u8| {
        let begins = matches!(
            before,
            b' ' | b'\t' | b'\r' | b'\n' | b':' | b',' | b'-' | b'?' | b'[' | b'{'
        );
        before = byte;
        begins && matches!(byte, b'[' | b'{')
    };
    document.bytes().map(opens).filter(|opened| *opened).count()
}

fn explain(error: serde_yaml::Error) -> SyntaxError {
    let at = error.location().map_or(Position::START, |found| Position {
        line: found.line(),
        column: found.column(),
    });
    let suffix = format!(" at line {} column {}", at.line, at.column);
    SyntaxError {
        at,
        text: error.to_string().replacen(&suffix, "", 1),
    }
}

/// What a node is, in the order in which nodes are met; the keys of mappings are left out.
enum Shape {
    Null,
    Text,
    List,
    Map,
}

/// The first reading.
struct Shapes<'a>(&'a mut Vec<Shape>);

impl Shapes<'_> {
    fn push<E: serde::de::Error>(self, shape: Shape) -> Result<(), E> {
        if self.0.len() == MAX_NODES {
            return Err(E::custom(format!("more than {MAX_NODES} values")));
        }
        self.0.push(shape);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Shapes<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Shapes<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a scalar, a list or a mapping")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.push(Shape::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<(), E> {
        self.push(Shape::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_i128<E: serde::de::Error>(self, _: i128) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_u128<E: serde::de::Error>(self, _: u128) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.push(Shape::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let shapes = self.0;
        Shapes(shapes).push(Shape::List)?;
        while list.next_element_seed(Shapes(shapes))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let shapes = self.0;
        Shapes(shapes).push(Shape::Map)?;
        while map.next_key_seed(Text)?.is_some() {
            map.next_value_seed(Shapes(shapes))?;
        }
        Ok(())
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(A::Error::custom("a tag (`!`) has no meaning here"))
    }
}

/// What the second reading knows of the document.
struct Source<'de> {
    document: &'de str,
    lines: Vec<usize>,
    shapes: std::vec::IntoIter<Shape>,
}

impl Source<'_> {
    /// Where `text` stands in the document, if it is a slice of it.
    fn position(&self, text: &str) -> Option<Position> {
        let offset = (text.as_ptr() as usize).checked_sub(self.document.as_ptr() as usize)?;
        let line = self.lines.partition_point(|start| *start <= offset);
        let start = *self.lines.get(line.checked_sub(1)?)?;
        let column = self.document.get(start..offset)?.chars().count() + 1;
        Some(Position { line, column })
    }
}

fn line_starts(document: &str) -> Vec<usize> {
    let breaks = document.bytes().enumerate();
    let after = breaks.filter_map(|(offset, byte)| (byte == b'\n').then_some(offset + 1));
    std::iter::once(0).chain(after).collect()
}

/// The second reading; the position is that of the key, or of the list, that leads here.
struct Texts<'a, 'de>(&'a mut Source<'de>, Position);

impl<'de> DeserializeSeed<'de> for Texts<'_, 'de> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Node, D::Error> {
        match self.0.shapes.next() {
            Some(Shape::List) => reader.deserialize_seq(self),
            Some(Shape::Map) => reader.deserialize_map(self),
            Some(Shape::Text) => {
                let (text, at) = located(self.0, Text.deserialize(reader)?, self.1);
                Ok(Node {
                    at,
                    value: Value::Text(text),
                })
            }
            Some(Shape::Null) | None => {
                reader.deserialize_ignored_any(IgnoredAny)?;
                Ok(Node {
                    at: self.1,
                    value: Value::Null,
                })
            }
        }
    }
}

impl<'de> Visitor<'de> for Texts<'_, 'de> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list or a mapping")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let Self(source, at) = self;
        let mut nodes = Vec::new();
        while let Some(node) = list.next_element_seed(Texts(source, at))? {
            nodes.push(node);
        }
        Ok(Node {
            at,
            value: Value::List(nodes),
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let Self(source, here) = self;
        let mut entries = Vec::new();
        while let Some(found) = map.next_key_seed(Text)? {
            let (key, at) = located(source, found, here);
            let node = map.next_value_seed(Texts(source, at))?;
            entries.push(Entry { at, key, node });
        }
        Ok(Node {
            at: here,
            value: Value::Map(entries),
        })
    }
}

fn located<'de>(source: &Source<'de>, found: Found<'de>, or: Position) -> (String, Position) {
    match found {
        Found::Slice(text) => (text.to_owned(), source.position(text).unwrap_or(or)),
        Found::Copy(text) => (text, or),
    }
}

/// Reads a scalar as it was written; anything else is an error.
struct Text;

enum Found<'de> {
    Slice(&'de str),
    Copy(String),
}

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Found<'de>;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Found<'de>, D::Error> {
        reader.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Found<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'de str) -> Result<Found<'de>, E> {
        Ok(Found::Slice(text))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Found<'de>, E> {
        Ok(Found::Copy(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree as one line: `key@line:column=value`.
    fn show(node: &Node) -> String {
        let list = |parts: Vec<String>| parts.join(" ");
        match &node.value {
            Value::Null => "null".into(),
            Value::Text(text) => format!("{text:?}@{}:{}", node.at.line, node.at.column),
            Value::List(nodes) => format!("[{}]", list(nodes.iter().map(show).collect())),
            Value::Map(entries) => {
                let show = |entry: &Entry| {
                    let Position { line, column } = entry.at;
                    format!("{}@{line}:{column}={}", entry.key, show(&entry.node))
                };
                format!("{{{}}}", list(entries.iter().map(show).collect()))
            }
        }
    }

    #[test]
    fn scalars_keep_their_text_and_place() {
        let document = "a:\n  b: 0x1f # hex\n  c: \"007\"\n  'd': 1e3\ne: [x, ~, yes]\nf:\né: é\n";
        assert_eq!(
            show(&parse(document).unwrap()),
            "{a@1:1={b@2:3=\"0x1f\"@2:6 c@3:3=\"007\"@3:7 d@4:4=\"1e3\"@4:8} \
             e@5:1=[\"x\"@5:5 null \"yes\"@5:11] f@6:1=null é@7:1=\"é\"@7:4}"
        );
    }

    #[test]
    fn text_that_is_no_slice_stands_at_its_key() {
        let document = "a: \"x\\ty\"\nb: |\n  one\n  two\n";
        assert_eq!(
            show(&parse(document).unwrap()),
            "{a@1:1=\"x\\ty\"@1:1 b@2:1=\"one\\ntwo\\n\"@2:1}"
        );
    }

    #[test]
    fn aliases_are_followed_and_repeated_keys_kept() {
        let document = "a: &x {k: 1}\nb: *x\nb: *x\n";
        assert_eq!(
            show(&parse(document).unwrap()),
            "{a@1:1={k@1:8=\"1\"@1:11} b@2:1={k@1:8=\"1\"@1:11} b@3:1={k@1:8=\"1\"@1:11}}"
        );
    }

    #[test]
    fn an_empty_document_is_null() {
        for document in ["", "\n\n", "# only a comment\n", "---\n", "~"] {
            assert_eq!(parse(document).unwrap().value, Value::Null, "{document:?}");
        }
    }

    #[test]
    fn syntax_errors_have_a_place() {
        let error = |document: &str| parse(document).unwrap_err();
        let place = |document: &str| (error(document).at.line, error(document).at.column);
        assert_eq!(place("a: 1\n\tb: 2\n"), (2, 1));
        assert_eq!(place("a: [1, 2\nb: 3\n").0, 2);
        assert_eq!(place("a: 1\nb: *nowhere\n").0, 2);
        assert_eq!(place("a: 1\n? [x]\n: 2\n").0, 2);
        assert_eq!(place("a: 1\nb: !thing 2\n").0, 2);
        assert!(error("a: 1\n---\nb: 2\n").text.contains("document"));
    }

    #[test]
    fn hostile_documents_end_soon() {
        let bomb: String = (1..30)
            .map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9)))
            .collect();
        let flow = |open: &str| {
            let head = open.repeat(MAX_FLOWS);
            let room = MAX_LEN / 8;
            head + &"a,".repeat(room)
        };
        let documents = [
            "[".repeat(MAX_LEN),
            "{a: ".repeat(MAX_LEN / 4),
            flow("["),
            flow("{a: "),
            "- ".repeat(MAX_LEN / 2),
            "? ".repeat(MAX_LEN / 2),
            "a: &a [*a]".to_owned(),
            format!("a0: &a0 x\n{bomb}"),
            "- x\n".repeat(MAX_NODES + 1),
            "\u{0}".repeat(1 << 10),
            "&a ".repeat(1 << 18),
            "\"".repeat(MAX_LEN - 1),
            "a".repeat(MAX_LEN - 1) + ":",
            " ".repeat(MAX_LEN + 1),
        ];
        for document in documents {
            let head: String = document.chars().take(12).collect();
            assert!(parse(&document).is_err(), "{head:?}");
        }
    }
}
