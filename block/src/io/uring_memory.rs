//! Memory registered with a ring: pinned once instead of for every operation.

use io_uring::Submitter;

use super::Segment;

/// The most bytes of one registered buffer.
const MAX_CHUNK: usize = 1 << 30;

/// The most registered buffers of a ring.
const MAX_CHUNKS: usize = 1 << 14;

/// A piece of a region, as the kernel has it registered.
#[derive(Debug)]
struct Chunk {
    start: usize,
    end: usize,
    index: u16,
}

/// The memory registered with one ring.
#[derive(Debug, Default)]
pub(super) struct RegisteredMemory {
    /// In order of their addresses.
    chunks: Vec<Chunk>,
}

impl RegisteredMemory {
    /// Replaces what is registered; whether the kernel did it.
    ///
    /// # Safety
    /// The regions stay mapped until they are replaced or the ring is gone.
    pub(super) unsafe fn register(
        &mut self,
        submitter: &Submitter<'_>,
        regions: &[(*mut u8, usize)],
    ) -> bool {
        if !self.chunks.is_empty() {
            self.chunks.clear();
            if let Err(error) = submitter.unregister_buffers() {
                tracing::warn!(%error, "io_uring: registered memory stays");
            }
        }
        let buffers = chunks(regions);
        if buffers.is_empty() || buffers.len() > MAX_CHUNKS {
            return false;
        }
        // SAFETY: the caller vouches for the memory.
        if let Err(error) = unsafe { submitter.register_buffers(&buffers) } {
            // A limit on locked memory, usually. It costs speed alone.
            tracing::debug!(%error, "io_uring: memory is not registered");
            return false;
        }
        self.chunks = buffers
            .iter()
            .zip(0..)
            .map(|(buffer, index)| Chunk {
                start: buffer.iov_base as usize,
                end: buffer.iov_base as usize + buffer.iov_len,
                index,
            })
            .collect();
        true
    }

    /// The registered buffer that holds a whole segment.
    pub(super) fn find(&self, segment: &Segment) -> Option<u16> {
        if self.chunks.is_empty() {
            return None;
        }
        let start = segment.as_ptr() as usize;
        let end = start.checked_add(segment.len())?;
        let after = self.chunks.partition_point(|chunk| chunk.start <= start);
        let chunk = self.chunks.get(after.checked_sub(1)?)?;
        (end <= chunk.end).then_some(chunk.index)
    }
}

/// Regions in order of their addresses, cut into pieces that the kernel registers.
fn chunks(regions: &[(*mut u8, usize)]) -> Vec<libc::iovec> {
    let mut chunks = Vec::new();
    for &(base, len) in regions {
        let mut done = 0;
        while done < len {
            let take = (len - done).min(MAX_CHUNK);
            chunks.push(libc::iovec {
                iov_base: base.wrapping_add(done).cast(),
                iov_len: take,
            });
            done += take;
        }
    }
    chunks.sort_by_key(|chunk| chunk.iov_base as usize);
    chunks
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn large_regions_are_cut_and_sorted() {
        let at = |address| ptr::without_provenance_mut(address);
        let list = chunks(&[(at(8 << 30), 4096), (at(1 << 30), (2 << 30) + 512)]);
        let found: Vec<_> = list
            .iter()
            .map(|c| (c.iov_base as usize, c.iov_len))
            .collect();
        assert_eq!(
            found,
            [
                (1 << 30, 1 << 30),
                (2 << 30, 1 << 30),
                (3 << 30, 512),
                (8 << 30, 4096)
            ]
        );
    }
}
