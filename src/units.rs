//! Durations and sizes as people write them: `"30s"`, `"512KiB"`.
//!
//! One number and one unit, nothing else, so that each value has one obvious spelling and prints as it was written.
//! The libraries for this take more (`"1h 30m"`, bare numbers, `"5k"`), and a contract that takes more has to keep it.

use std::time::Duration;

const DURATION_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
/// Longest first: a size prints in the first of these that divides it.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("KB", 1000),
    ("KiB", 1 << 10),
    ("B", 1),
];
/// A hundred years: what is longer is a slip, and would overflow the clocks that it is added to.
const DURATION_MAX: Duration = Duration::from_secs(36_500 * 86_400);

/// Why a text is no duration or size. It shows the accepted form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    #[error("{0:?} is no duration: write a whole number and its unit (ms, s, m, h, d), such as \"30s\"")]
    Duration(String),
    #[error("{0:?} is longer than the longest duration, \"36500d\"")]
    DurationTooLong(String),
    #[error(
        "{0:?} is no size: write a whole number and its unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), such as \"512KiB\""
    )]
    Size(String),
    #[error("{0:?} is larger than any size that can be counted here")]
    SizeTooLarge(String),
}

pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let (number, unit) = split(text, &DURATION_UNITS).ok_or_else(|| UnitError::Duration(text.to_owned()))?;
    let millis = number.and_then(|number| number.checked_mul(unit));
    match millis.map(Duration::from_millis) {
        Some(duration) if duration <= DURATION_MAX => Ok(duration),
        _ => Err(UnitError::DurationTooLong(text.to_owned())),
    }
}

pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text, &SIZE_UNITS).ok_or_else(|| UnitError::Size(text.to_owned()))?;
    number.and_then(|number| number.checked_mul(unit)).ok_or_else(|| UnitError::SizeTooLarge(text.to_owned()))
}

/// The duration in its largest whole unit. Less than a millisecond is not written.
pub fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    let fits = |unit: u64| millis > 0 && millis.is_multiple_of(u128::from(unit));
    match DURATION_UNITS.iter().find(|(_, unit)| fits(*unit)) {
        Some((name, unit)) => format!("{}{name}", millis / u128::from(*unit)),
        None => "0s".to_owned(),
    }
}

/// The size in the unit that leaves the smallest whole number.
pub fn show_size(bytes: u64) -> String {
    let whole = SIZE_UNITS.iter().filter(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit));
    match whole.min_by_key(|(_, unit)| bytes / unit) {
        Some((name, unit)) => format!("{}{name}", bytes / unit),
        None => "0B".to_owned(),
    }
}

/// The number and the factor of its unit; `Some(None, …)` where the number alone is too large.
fn split(text: &str, units: &[(&str, u64)]) -> Option<(Option<u64>, u64)> {
    let (digits, name) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let (_, factor) = units.iter().find(|(unit, _)| *unit == name)?;
    (!digits.is_empty()).then(|| (digits.parse().ok(), *factor))
}

/// For `#[serde(with = "units::duration")]`.
pub mod duration {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use std::time::Duration;

    pub fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::show_duration(*duration))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        super::parse_duration(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}

/// For `#[serde(with = "units::size")]`.
pub mod size {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &usize, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::show_size(*bytes as u64))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
        let bytes = super::parse_size(&String::deserialize(from)?).map_err(de::Error::custom)?;
        usize::try_from(bytes).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_whole_number_and_a_unit_and_prints_as_it_was_written() {
        let table =
            [("500ms", 500), ("30s", 30_000), ("2m", 120_000), ("1h", 3_600_000), ("7d", 604_800_000)];
        for (text, millis) in table {
            let duration = parse_duration(text).unwrap();
            assert_eq!(duration, Duration::from_millis(millis));
            assert_eq!(show_duration(duration), text);
        }
        assert_eq!(show_duration(parse_duration("90s").unwrap()), "90s");
        assert_eq!(show_duration(parse_duration("0ms").unwrap()), "0s");
        for bad in ["", "30", "s", "30 s", "-1s", "+1s", "1.5s", "1h30m", "30S", "1w", "٣s"] {
            assert_eq!(parse_duration(bad), Err(UnitError::Duration(bad.into())), "{bad}");
        }
        for long in ["36501d", "99999999999999999999999s", "18446744073709551615d"] {
            assert_eq!(parse_duration(long), Err(UnitError::DurationTooLong(long.into())));
        }
        assert!(parse_duration("30").unwrap_err().to_string().contains("such as \"30s\""));
    }

    #[test]
    fn a_size_is_a_whole_number_and_a_unit_and_prints_as_it_was_written() {
        let table = [
            ("100B", 100),
            ("1KB", 1000),
            ("512KiB", 512 << 10),
            ("1MB", 1_000_000),
            ("64MiB", 64 << 20),
            ("10GiB", 10 << 30),
            ("3TB", 3_000_000_000_000),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), Ok(bytes));
            assert_eq!(show_size(bytes), text);
        }
        assert_eq!(show_size(0), "0B");
        for bad in ["", "512", "KiB", "512 KiB", "512kib", "1.5MB", "-1B", "10G"] {
            assert_eq!(parse_size(bad), Err(UnitError::Size(bad.into())), "{bad}");
        }
        for large in ["99999999TiB", "99999999999999999999B"] {
            assert_eq!(parse_size(large), Err(UnitError::SizeTooLarge(large.into())));
        }
        assert!(parse_size("512").unwrap_err().to_string().contains("such as \"512KiB\""));
    }
}
