//! The bytes of a simulated file, sparse and cheap to copy; and the random numbers of a simulation.

use std::{collections::BTreeMap, sync::Arc};

const PAGE: usize = 4096;

/// Bytes of a file: pages that were never written are zero and take no memory; copies share pages.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
    len: u64,
}

impl Content {
    pub(super) fn from_slice(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.write(0, bytes);
        content
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Changes the length; what is cut off is gone, what is added is zero.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            let old = std::mem::replace(&mut self.len, len);
            self.clear_range(len, old);
        }
        self.len = len;
    }

    /// Fills `out` from `offset`; returns how many bytes the file has there.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let have = self.len.saturating_sub(offset).min(out.len() as u64) as usize;
        let mut done = 0;
        while done < have {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let take = (PAGE - within).min(have - done);
            let target = &mut out[done..done + take];
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => target.copy_from_slice(&page[within..within + take]),
                None => target.fill(0),
            }
            done += take;
        }
        have
    }

    /// Writes, extending the file as needed.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let take = (PAGE - within).min(bytes.len() - done);
            let page = self
                .pages
                .entry(at / PAGE as u64)
                .or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[within..within + take].copy_from_slice(&bytes[done..done + take]);
            done += take;
        }
        if !bytes.is_empty() {
            self.len = self.len.max(offset + bytes.len() as u64);
        }
    }

    /// Zeroes a range without changing the length.
    pub(super) fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset < end {
            self.clear_range(offset, end);
        }
    }

    fn clear_range(&mut self, start: u64, end: u64) {
        let page = PAGE as u64;
        let touched: Vec<u64> = self
            .pages
            .range(start / page..end.div_ceil(page))
            .map(|(index, _)| *index)
            .collect();
        for index in touched {
            let from = start.saturating_sub(index * page).min(page) as usize;
            let to = (end - index * page).min(page) as usize;
            if from == 0 && to == PAGE {
                self.pages.remove(&index);
            } else if let Some(page) = self.pages.get_mut(&index) {
                Arc::make_mut(page)[from..to].fill(0);
            }
        }
    }

    /// Whether every page of a range was written before: writing it again needs no space.
    pub(super) fn is_allocated(&self, offset: u64, len: u64) -> bool {
        let page = PAGE as u64;
        let end = offset.saturating_add(len);
        let pages = offset / page..end.div_ceil(page);
        let wanted = pages.end.saturating_sub(pages.start);
        end <= self.len && self.pages.range(pages).count() as u64 == wanted
    }

    /// The runs of written pages.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().filter_map(|(index, page)| {
            let start = index * PAGE as u64;
            let len = self.len.checked_sub(start)?.min(PAGE as u64) as usize;
            Some((start, &page[..len]))
        })
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.read(0, &mut bytes);
        bytes
    }
}

/// Random numbers from a seed (SplitMix64): the same everywhere and for ever.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `low..=high`.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        match high.checked_sub(low).and_then(|span| span.checked_add(1)) {
            Some(span) => low + self.next() % span,
            None => low,
        }
    }

    /// True with this probability.
    pub(super) fn chance(&mut self, probability: f64) -> bool {
        // No number is drawn for what never happens, so that adding an option leaves old seeds be.
        probability > 0.0 && ((self.next() >> 11) as f64) < probability * (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_a_byte_array() {
        let mut rng = Rng::new(7);
        let mut content = Content::default();
        let mut model: Vec<u8> = Vec::new();
        for round in 0..2000 {
            let offset = rng.between(0, 30_000);
            let len = rng.between(0, 9000) as usize;
            match rng.between(0, 9) {
                0 => {
                    content.set_len(offset);
                    model.resize(offset as usize, 0);
                }
                1..=3 => {
                    content.zero(offset, len as u64);
                    let end = model.len().min(offset as usize + len);
                    if let Some(range) = model.get_mut(offset as usize..end) {
                        range.fill(0);
                    }
                }
                _ => {
                    let bytes = vec![round as u8; len];
                    content.write(offset, &bytes);
                    if len > 0 {
                        let end = offset as usize + len;
                        model.resize(model.len().max(end), 0);
                        model[offset as usize..end].copy_from_slice(&bytes);
                    }
                }
            }
            assert_eq!(content.to_vec(), model, "round {round}");
        }
    }
}
