//! What came out: medians and spreads over the rounds, side by side, as a table and as JSON.

use serde_json::{Value, json};

use super::load::Round;

/// Above so much of a processor the generator may be what is measured.
const BUSY: f64 = 0.8;

/// A figure over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        let (min, max) = (*figures.first()?, *figures.last()?);
        let middle = figures.len() / 2;
        let median = match figures.len() % 2 {
            0 => (figures[middle - 1] + figures[middle]) / 2.0,
            _ => figures[middle],
        };
        Some(Self { median, min, max })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

/// The rounds of one target and lane under one load.
#[derive(Debug)]
pub struct Row {
    pub name: String,
    pub target: &'static str,
    pub lane: &'static str,
    /// Whether the load generator and what it measures are one process.
    pub one_process: bool,
    pub rounds: Vec<Round>,
}

const PERCENTILES: [(&str, f64); 4] = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("max", 100.0)];

impl Row {
    fn over(&self, figure: impl Fn(&Round) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(figure).collect())
    }

    fn rate(&self) -> Option<Spread> {
        self.over(|round| Some(round.rate))
    }

    /// In milliseconds.
    fn latency(&self, percentile: f64) -> Option<Spread> {
        self.over(|round| Some(round.latency.as_ref()?.value_at_percentile(percentile) as f64 / 1e6))
    }

    /// Until the acknowledgement, p50 in milliseconds, where messages are delivered besides.
    fn ack(&self) -> Option<Spread> {
        self.over(|round| Some(round.acks.as_ref()?.value_at_quantile(0.5) as f64 / 1e6))
    }

    /// Microseconds of processor time a message: of the process that carried it.
    fn processor(&self) -> Option<Spread> {
        self.over(|round| {
            let spent = if self.one_process { round.spent.own } else { round.spent.carrier? };
            (round.counted > 0).then(|| spent.as_secs_f64() * 1e6 / round.counted as f64)
        })
    }

    /// How much of one processor this process took.
    fn generator(&self) -> Option<Spread> {
        self.over(|round| (round.seconds > 0.0).then(|| round.spent.own.as_secs_f64() / round.seconds))
    }

    fn sum(&self, count: impl Fn(&Round) -> u64) -> u64 {
        self.rounds.iter().map(count).sum()
    }
}

/// Of the medians.
fn ratio(one: Option<Spread>, other: Option<Spread>) -> Option<f64> {
    let (one, other) = (one?.median, other?.median);
    (other > 0.0).then(|| one / other)
}

/// One load on everything that was compared.
#[derive(Debug)]
pub struct Table {
    pub workload: &'static str,
    /// What was done, in words.
    pub title: String,
    /// What the rate counts.
    pub unit: &'static str,
    /// The options that were in force.
    pub options: Value,
    pub rows: Vec<Row>,
}

impl Table {
    /// Each with every later one of the same target or the same lane.
    fn pairs(&self) -> impl Iterator<Item = (&Row, &Row)> {
        let pairs = self.rows.iter().enumerate();
        let pairs = pairs.flat_map(|(at, one)| self.rows[at + 1..].iter().map(move |other| (one, other)));
        pairs.filter(|(one, other)| one.target == other.target || one.lane == other.lane)
    }

    pub fn json(&self) -> Value {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                let latency: serde_json::Map<_, _> = PERCENTILES
                    .iter()
                    .filter_map(|(name, percentile)| {
                        Some(((*name).to_owned(), row.latency(*percentile)?.json()))
                    })
                    .collect();
                json!({
                    "target": row.target,
                    "lane": row.lane,
                    "rounds": row.rounds.len(),
                    "sent": row.sum(|round| round.sent),
                    "acked": row.sum(|round| round.acked),
                    "expected": row.sum(|round| round.expected),
                    "received": row.sum(|round| round.received),
                    "repeated": row.sum(|round| round.repeated),
                    "rate": row.rate().map(Spread::json),
                    "latency_ms": latency,
                    "ack_p50_ms": row.ack().map(Spread::json),
                    "processor_us_per_message": row.processor().map(Spread::json),
                    "processor_includes_load": row.one_process,
                    "load_processors": row.generator().map(Spread::json),
                })
            })
            .collect();
        let ratios: Vec<_> = self
            .pairs()
            .map(|(one, other)| {
                let mut ratios = json!({
                    "of": [one.target, one.lane],
                    "to": [other.target, other.lane],
                    "rate": ratio(one.rate(), other.rate()),
                });
                for (name, percentile) in PERCENTILES {
                    if let Some(ratio) = ratio(one.latency(percentile), other.latency(percentile)) {
                        ratios[name] = json!(ratio);
                    }
                }
                if let Some(ratio) = ratio(one.latency(50.0), other.ack()) {
                    ratios["p50_to_ack"] = json!(ratio);
                }
                ratios
            })
            .collect();
        json!({
            "workload": self.workload,
            "unit": self.unit,
            "options": self.options,
            "results": rows,
            "ratios": ratios,
        })
    }

    pub fn print(&self) {
        println!("{}", self.render());
    }

    fn render(&self) -> String {
        let first = &self.rows[0];
        let spread = first.rounds.len() > 1;
        let (has_latency, has_acks) = (first.latency(50.0).is_some(), first.ack().is_some());
        let mut head = vec![String::new(), self.unit.to_owned()];
        if has_latency {
            head.extend(["p50 ms", "p90 ms", "p99 ms", "max ms"].map(String::from));
        }
        if has_acks {
            head.push("ack p50 ms".into());
        }
        head.extend(["µs/msg", "load"].map(String::from));
        let mut lines = vec![head];
        let (mut notes, mut one_process) = (Vec::new(), false);
        for row in &self.rows {
            let mut cells = vec![row.name.clone(), cell(row.rate(), spread, short)];
            if has_latency {
                cells.push(cell(row.latency(50.0), spread, fixed));
                cells.extend(PERCENTILES[1..].iter().map(|(_, p)| cell(row.latency(*p), false, fixed)));
            }
            if has_acks {
                cells.push(cell(row.ack(), false, fixed));
            }
            let mark = if row.one_process { "*" } else { "" };
            one_process |= row.one_process;
            cells.push(cell(row.processor(), false, fixed) + mark);
            cells.push(cell(row.generator(), false, |share| format!("{:.0} %", share * 100.0)));
            lines.push(cells);
            let (received, repeated) = (row.sum(|round| round.received), row.sum(|round| round.repeated));
            let expected = row.sum(|round| round.expected);
            if received < expected {
                notes.push(format!(
                    "{}: {} of {expected} deliveries are missing",
                    row.name,
                    expected - received
                ));
            }
            if repeated > 0 {
                notes.push(format!("{}: {repeated} deliveries came again", row.name));
            }
            if !row.one_process && row.generator().is_some_and(|share| share.median > BUSY) {
                notes.push(format!("{}: the load took most of a processor and may be the limit", row.name));
            }
        }
        if one_process {
            notes.push("* the load is in the same process and included".into());
        }
        let widths: Vec<_> = (0..lines[0].len())
            .map(|at| lines.iter().map(|cells| cells[at].chars().count()).max().unwrap_or_default())
            .collect();
        let mut text = format!("{}\n", self.title);
        for cells in lines {
            let (name, rest) = (&cells[0], &cells[1..]);
            text += &format!("  {name:width$}", width = widths[0]);
            for (cell, width) in rest.iter().zip(&widths[1..]) {
                text += &format!("  {cell:>width$}");
            }
            text += "\n";
        }
        for (one, other) in self.pairs() {
            let show = |what: &str, ratio: Option<f64>| ratio.map(|ratio| format!("{what} {ratio:.2}"));
            let ratios = [
                show("rate", ratio(one.rate(), other.rate())),
                show("p50", ratio(one.latency(50.0), other.latency(50.0))),
                show("p99", ratio(one.latency(99.0), other.latency(99.0))),
                show("p50 / ack p50", ratio(one.latency(50.0), other.ack())),
            ];
            let ratios: Vec<_> = ratios.into_iter().flatten().collect();
            text += &format!("  {} / {}: {}\n", one.name, other.name, ratios.join(", "));
        }
        for note in notes {
            text += &format!("  {note}\n");
        }
        text
    }
}

fn cell(spread: Option<Spread>, whole: bool, show: impl Fn(f64) -> String) -> String {
    match spread {
        None => "-".into(),
        Some(spread) if whole => {
            format!("{} ({}..{})", show(spread.median), show(spread.min), show(spread.max))
        }
        Some(spread) => show(spread.median),
    }
}

/// `48.9k`: three digits are what such a figure is good for.
fn short(figure: f64) -> String {
    match figure {
        f if f >= 999_500.0 => format!("{:.2}M", f / 1e6),
        f if f >= 99_950.0 => format!("{:.0}k", f / 1e3),
        f if f >= 9_995.0 => format!("{:.1}k", f / 1e3),
        f => format!("{f:.0}"),
    }
}

fn fixed(figure: f64) -> String {
    match figure {
        f if f >= 100.0 => format!("{f:.0}"),
        f if f >= 10.0 => format!("{f:.1}"),
        f => format!("{f:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_over_rounds_is_its_median_and_its_ends() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(vec![3.0, 1.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(vec![]), None);
        let (two, four) = (Spread::of(vec![2.0]), Spread::of(vec![4.0]));
        assert_eq!(
            (ratio(two, four), ratio(two, Spread::of(vec![0.0])), ratio(None, two)),
            (Some(0.5), None, None)
        );
    }

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(
            [2_030_000.0, 366_400.0, 48_912.0, 2_512.4].map(short),
            ["2.03M", "366k", "48.9k", "2512"]
        );
        assert_eq!([2.456, 15.71, 220.4].map(fixed), ["2.46", "15.7", "220"]);
    }
}
