//! The lengths that devices pad to; the rule is in `schemas/content.proto`.

/// Padding fills small plaintexts to multiples of this.
pub const BUCKET: usize = 160;
/// Up to here multiples of [`BUCKET`] are used, beyond it Padmé.
const SMALL: usize = 1_600;

/// The next length of the scheme.
pub fn padded_len(length: usize) -> usize {
    if length <= SMALL {
        return length.next_multiple_of(BUCKET);
    }
    let exponent = length.ilog2();
    let significant = exponent.ilog2() + 1;
    length.next_multiple_of(1 << (exponent - significant))
}
