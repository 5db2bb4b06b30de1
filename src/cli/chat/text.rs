//! Text for the terminal: made harmless, and broken into lines.

use ratatui::text::Span;

/// What somebody else wrote must not move the cursor or change colours: control characters are shown as a replacement.
pub(super) fn harmless(text: &str) -> String {
    let bidi = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if (c.is_control() && c != '\n') || bidi(c) { '\u{fffd}' } else { c }).collect()
}

/// Columns a text takes.
pub(super) fn width(text: &str) -> usize {
    Span::raw(text).width()
}

/// Breaks a text into lines of at most `columns`, at spaces where it can.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(2);
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        let mut used = 0;
        for word in paragraph.split_inclusive(' ') {
            let word_width = width(word.trim_end());
            if used > 0 && used + word_width > columns {
                lines.push(std::mem::take(&mut line).trim_end().to_owned());
                used = 0;
            }
            for c in word.chars() {
                let columns_of_c = width(c.encode_utf8(&mut [0; 4]));
                if used + columns_of_c > columns && c != ' ' {
                    lines.push(std::mem::take(&mut line));
                    used = 0;
                }
                line.push(c);
                used += columns_of_c;
            }
        }
        lines.push(line.trim_end().to_owned());
    }
    lines
}

/// Hours and minutes of a time, UTC; good enough for a chat on one's own machine without a time zone database.
pub(super) fn clock(ms: u64) -> String {
    let minutes = ms / 60_000;
    format!("{:02}:{:02}", minutes / 60 % 24, minutes % 60)
}

/// The day of a time, UTC, as `2026-11-23` (the civil calendar's arithmetic, after Howard Hinnant's `days` papers).
pub(in crate::cli) fn day(ms: u64) -> String {
    let days = ms / 86_400_000 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_disarmed() {
        assert_eq!(harmless("a\u{1b}[31mb\r\u{202e}c\nd"), "a\u{fffd}[31mb\u{fffd}\u{fffd}c\nd");
    }

    #[test]
    fn lines_break_at_spaces_and_long_words_anywhere() {
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(wrap("a\n\nb", 4), ["a", "", "b"]);
        assert_eq!(wrap("日本語テキスト", 6), ["日本語", "テキス", "ト"]);
        assert_eq!(wrap("", 5), [""]);
        for columns in 0..12 {
            let lines = wrap("the quick brown fox 日本 jumps", columns);
            assert!(lines.iter().all(|line| width(line) <= columns.max(2)), "{columns}: {lines:?}");
        }
    }

    #[test]
    fn times_are_readable() {
        assert_eq!((day(0).as_str(), clock(0).as_str()), ("1970-01-01", "00:00"));
        assert_eq!((day(1_709_164_799_000).as_str(), clock(1_709_164_799_000).as_str()), ("2024-02-28", "23:59"));
        assert_eq!(day(1_709_164_800_000), "2024-02-29");
        assert_eq!(day(1_795_392_000_000), "2026-11-23");
    }
}
