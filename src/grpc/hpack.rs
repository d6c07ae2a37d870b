//! Header lists as HTTP/2 carries them (RFC 7541).
//!
//! A tunnel has one call, so its header lists are few: decoding is as small as it can be, not as
//! fast, and what is sent refers to no table.

use std::collections::VecDeque;

use bytes::{BufMut, BytesMut};
use thiserror::Error;

/// A name and a value.
pub(super) type Field = (Vec<u8>, Vec<u8>);

/// The size that a dynamic table has unless the other side is told otherwise, and its most
/// (RFC 9113, section 6.5.2).
pub(super) const TABLE_SIZE: usize = 4096;

/// What a field counts beyond its bytes (RFC 7541, section 4.1).
const FIELD_OVERHEAD: usize = 32;

/// A header list that isn't one. The connection can't go on: the table may be out of step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum Malformed {
    /// Not what RFC 7541 describes.
    #[error("a header list that can't be decoded")]
    Code,
    /// Longer than allowed.
    #[error("a header list that is too long")]
    TooLong,
}

/// What the peer has put aside, newest first.
#[derive(Debug)]
pub(super) struct Table {
    fields: VecDeque<Field>,
    size: usize,
    max_size: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            fields: VecDeque::new(),
            size: 0,
            max_size: TABLE_SIZE,
        }
    }
}

impl Table {
    /// Decodes a block of fields that together may have `limit` bytes, overhead included.
    pub(super) fn decode(&mut self, block: &[u8], limit: usize) -> Result<Vec<Field>, Malformed> {
        let mut rest = Reader(block);
        let mut fields = Vec::new();
        let mut size = 0;
        while let Some(first) = rest.0.first().copied() {
            let field = match first {
                // Indexed.
                0x80.. => self.get(rest.integer(7)?)?,
                // Literal, to be put aside.
                0x40.. => {
                    let field = self.literal(&mut rest, 6)?;
                    self.insert(field.clone());
                    field
                }
                // A new size for the table: only before the first field (section 4.2).
                0x20.. => {
                    let size = rest.integer(5)?;
                    if size > TABLE_SIZE || !fields.is_empty() {
                        return Err(Malformed::Code);
                    }
                    self.max_size = size;
                    self.shrink();
                    continue;
                }
                // Literal, not to be put aside, or never.
                _ => self.literal(&mut rest, 4)?,
            };
            size += size_of_field(&field);
            if size > limit {
                return Err(Malformed::TooLong);
            }
            fields.push(field);
        }
        Ok(fields)
    }

    fn literal(&self, rest: &mut Reader<'_>, prefix: u32) -> Result<Field, Malformed> {
        let name = match rest.integer(prefix)? {
            0 => rest.string()?,
            index => self.get(index)?.0,
        };
        Ok((name, rest.string()?))
    }

    fn get(&self, index: usize) -> Result<Field, Malformed> {
        let index = index.checked_sub(1).ok_or(Malformed::Code)?;
        match STATIC.get(index) {
            Some((name, value)) => Ok((name.as_bytes().to_vec(), value.as_bytes().to_vec())),
            None => {
                let field = self.fields.get(index - STATIC.len());
                field.cloned().ok_or(Malformed::Code)
            }
        }
    }

    fn insert(&mut self, field: Field) {
        self.size += size_of_field(&field);
        self.fields.push_front(field);
        // One that is larger than the table empties it (section 4.4).
        self.shrink();
    }

    fn shrink(&mut self) {
        while self.size > self.max_size
            && let Some(oldest) = self.fields.pop_back()
        {
            self.size -= size_of_field(&oldest);
        }
    }
}

fn size_of_field((name, value): &Field) -> usize {
    name.len() + value.len() + FIELD_OVERHEAD
}

/// Begins a block by saying that no table is used (section 6.3).
pub(super) fn encode_empty_table(out: &mut BytesMut) {
    out.put_u8(0x20);
}

/// Appends a field, in plain bytes and without a reference to any table.
pub(super) fn encode(out: &mut BytesMut, name: &str, value: &str) {
    out.put_u8(0);
    for text in [name, value] {
        encode_length(out, text.len());
        out.put_slice(text.as_bytes());
    }
}

/// The length of a string that isn't Huffman-coded (sections 5.1 and 5.2).
fn encode_length(out: &mut BytesMut, length: usize) {
    const PREFIX: usize = 0x7f;
    if length < PREFIX {
        return out.put_u8(length as u8);
    }
    out.put_u8(PREFIX as u8);
    let mut rest = length - PREFIX;
    while rest >= 0x80 {
        out.put_u8(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (first, rest) = self.0.split_first().ok_or(Malformed::Code)?;
        self.0 = rest;
        Ok(*first)
    }

    /// An integer that begins in the last `prefix` bits of the next byte (section 5.1).
    fn integer(&mut self, prefix: u32) -> Result<usize, Malformed> {
        let most = (1_usize << prefix) - 1;
        let mut value = usize::from(self.byte()?) & most;
        if value < most {
            return Ok(value);
        }
        // Three more bytes are 2 MiB, which is far beyond any list that is taken.
        for shift in [0, 7, 14] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed::Code)
    }

    fn string(&mut self) -> Result<Vec<u8>, Malformed> {
        let is_huffman = self.0.first().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)?;
        let (string, rest) = self.0.split_at_checked(length).ok_or(Malformed::Code)?;
        self.0 = rest;
        match is_huffman {
            true => decode_huffman(string).ok_or(Malformed::Code),
            false => Ok(string.to_vec()),
        }
    }
}

/// Decodes a Huffman-coded string (section 5.2), bit by bit. The code is canonical: of each length
/// the codes are consecutive, and begin where those of the length before have ended, doubled.
fn decode_huffman(string: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(string.len() * 8 / 5);
    let mut code = Code::default();
    for byte in string {
        for bit in (0..8).rev() {
            if let Some(symbol) = code.push(byte >> bit & 1)? {
                decoded.push(symbol);
                code = Code::default();
            }
        }
    }
    // What is left fills the last byte, with the beginning of the longest code: ones.
    (code.length < 8 && code.all_ones).then_some(decoded)
}

struct Code {
    length: usize,
    bits: u32,
    /// The first code of this length, and the place of its symbol.
    first: u32,
    index: u32,
    all_ones: bool,
}

impl Default for Code {
    fn default() -> Self {
        Self {
            length: 0,
            bits: 0,
            first: 0,
            index: 0,
            all_ones: true,
        }
    }
}

impl Code {
    /// The symbol if the code is complete with this bit; none at all if there is no such code.
    fn push(&mut self, bit: u8) -> Option<Option<u8>> {
        self.length += 1;
        self.bits = self.bits << 1 | u32::from(bit);
        self.first <<= 1;
        self.all_ones &= bit == 1;
        let count = *CODES.get(self.length)?;
        if let Some(place) = self.bits.checked_sub(self.first).filter(|at| *at < count) {
            // The one symbol beyond the table is the end of a string, which mustn't be sent.
            return SYMBOLS
                .get((self.index + place) as usize)
                .copied()
                .map(Some);
        }
        self.first += count;
        self.index += count;
        Some(None)
    }
}

/// How many codes there are of each length in bits (RFC 7541, appendix B).
const CODES: [u32; 31] = [
    0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19,
    29, 0, 4,
];

/// The symbols in the order of their codes, but for the last one, which ends a string.
#[rustfmt::skip]
const SYMBOLS: [u8; 256] = [
    48, 49, 50, 97, 99, 101, 105, 111, 115, 116, 32, 37, 45, 46, 47, 51, 52, 53, 54, 55, 56, 57,
    61, 65, 95, 98, 100, 102, 103, 104, 108, 109, 110, 112, 114, 117, 58, 66, 67, 68, 69, 70, 71,
    72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 89, 106, 107, 113, 118, 119,
    120, 121, 122, 38, 42, 44, 59, 88, 90, 33, 34, 40, 41, 63, 39, 43, 124, 35, 62, 0, 36, 64, 91,
    93, 126, 94, 125, 60, 96, 123, 92, 195, 208, 128, 130, 131, 162, 184, 194, 224, 226, 153, 161,
    167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230, 129, 132, 133, 134, 136, 146, 154, 156,
    160, 163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233, 1,
    135, 137, 138, 139, 140, 141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174,
    175, 180, 182, 183, 188, 191, 197, 231, 239, 9, 142, 144, 145, 148, 159, 171, 206, 215, 225,
    236, 237, 199, 207, 234, 235, 192, 193, 200, 201, 202, 205, 210, 213, 218, 219, 238, 240, 242,
    243, 255, 203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250, 251, 252,
    253, 254, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 127, 220, 249, 10, 13, 22,
];

/// RFC 7541, appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<_> = hex.chars().filter(char::is_ascii_hexdigit).collect();
        let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16);
        digits.chunks(2).map(|pair| byte(pair).unwrap()).collect()
    }

    fn decoded(table: &mut Table, hex: &str) -> Vec<(String, String)> {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let fields = table.decode(&bytes(hex), 10_000).unwrap();
        fields
            .into_iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect()
    }

    /// RFC 7541, appendices C.3 and C.4: three requests on one connection.
    #[test]
    fn the_examples_of_requests_are_decoded() {
        let plain = [
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ];
        let huffman = [
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ];
        for [first, second, third] in [plain, huffman] {
            let mut table = Table::default();
            let get = |scheme, path| {
                [
                    (":method", "GET"),
                    (":scheme", scheme),
                    (":path", path),
                    (":authority", "www.example.com"),
                ]
            };
            assert_eq!(decoded(&mut table, first), pairs(&get("http", "/")));
            let mut expected = get("http", "/").to_vec();
            expected.push(("cache-control", "no-cache"));
            assert_eq!(decoded(&mut table, second), pairs(&expected));
            let mut expected = get("https", "/index.html").to_vec();
            expected.push(("custom-key", "custom-value"));
            assert_eq!(decoded(&mut table, third), pairs(&expected));
            assert_eq!(table.size, 164);
        }
    }

    /// RFC 7541, appendix C.6, with a table of 256 bytes that forgets.
    #[test]
    fn old_fields_leave_a_full_table() {
        let mut table = Table::default();
        let first = "3fe101 488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3";
        let fields = decoded(&mut table, first);
        assert_eq!(fields[0], (":status".into(), "302".into()));
        assert_eq!(
            fields[3],
            ("location".into(), "https://www.example.com".into())
        );
        assert_eq!((table.fields.len(), table.size), (4, 222));
        assert_eq!(decoded(&mut table, "4883640effc1c0bf")[0].1, "307");
        assert_eq!((table.fields.len(), table.size), (4, 222));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let refused = |hex: &str| Table::default().decode(&bytes(hex), 1000);
        for hex in [
            "80",                      // Index 0.
            "be",                      // Index 62 of an empty table.
            "ff ff ff ff 7f",          // An endless index.
            "00 05 61",                // A name that is cut.
            "82 20",                   // A table's size after a field.
            "3f e2 1f",                // A table of 4,097 bytes.
            "00 01 61 82 ff ff",       // More than a byte of filling.
            "00 01 61 81 1e",          // Filling that isn't ones, after an a.
            "00 01 61 84 ff ff ff fc", // The end of a string, in it.
        ] {
            assert_eq!(refused(hex), Err(Malformed::Code), "{hex}");
        }
        assert_eq!(
            Table::default().decode(&bytes("82 82 82"), 100),
            Err(Malformed::TooLong)
        );
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            fields in proptest::collection::vec(("[a-z-]{1,300}", "[ -~]{0,20000}"), 0..4),
        ) {
            let mut block = BytesMut::new();
            for (name, value) in &fields {
                encode(&mut block, name, value);
            }
            let again = Table::default().decode(&block, 1 << 20).unwrap();
            let fields: Vec<_> = fields
                .into_iter()
                .map(|(name, value)| (name.into_bytes(), value.into_bytes()))
                .collect();
            prop_assert_eq!(again, fields);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(
            blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 1..5),
        ) {
            let mut table = Table::default();
            for block in blocks {
                if let Ok(fields) = table.decode(&block, 1000) {
                    prop_assert!(fields.iter().map(size_of_field).sum::<usize>() <= 1000);
                }
                prop_assert!(table.size <= table.max_size);
                prop_assert_eq!(table.size, table.fields.iter().map(size_of_field).sum::<usize>());
            }
        }
    }
}
